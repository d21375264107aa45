"""The generated code is that of protos/, and importable where it is."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "cluster" / "pb"


def without_stamps(path):
    """The text of a generated file but for the generators' versions, on which it does not depend otherwise."""
    text = re.sub(r"Protobuf Python Version: .*", "", path.read_text())
    text = re.sub(r"Domain\.PUBLIC,\n(    \d+,\n){3}", "Domain.PUBLIC,\n", text)
    return re.sub(r"GRPC_GENERATED_VERSION = .*", "", text)


def test_generated_code_is_up_to_date(tmp_path):
    script = [sys.executable, ROOT / ".ci" / "protos", "--installed", tmp_path]
    subprocess.run(script, check=True, timeout=60)
    fresh = {p.relative_to(tmp_path): without_stamps(p) for p in tmp_path.rglob("*.py*") if p.suffix != ".pyc"}
    kept = {p.relative_to(GENERATED): without_stamps(p) for p in GENERATED.rglob("*.py*") if p.suffix != ".pyc"}
    assert Path("moecluster/v1/inference_pb2.pyi") in fresh
    assert fresh == kept, "run .ci/protos"


def test_requests_of_both_generate_rpcs_have_the_same_fields_but_one():
    from cluster.pb.moecluster.v1 import inference_pb2 as pb

    def fields(message):
        return [(f.number, f.name, f.type) for f in message.DESCRIPTOR.fields]

    assert [*fields(pb.GenerateRequest), (8, "continue_from", 13)] == fields(pb.GenerateStreamRequest)


def test_sampling_fields_are_those_of_the_type_and_numbers_are_optional():
    from dataclasses import fields

    from cluster.pb.moecluster.v1 import inference_pb2 as pb
    from cluster.types import SamplingParams

    proto = pb.SamplingParams.DESCRIPTOR.fields
    assert [f.name for f in fields(SamplingParams)] == [f.name for f in proto]
    plain = {f.name for f in proto if not f.has_presence}
    assert plain == {"stop", "stop_token_ids", "ignore_eos", "logit_bias"}


# Requests with one of these are refused as a whole, so their fields are nobody's business.
REFUSED = {"vllm.grpc.engine.MultimodalInputs", "vllm.grpc.engine.MediaRefs", "vllm.grpc.engine.KvTransferParams"}
WITHOUT = {"FlushCache", "StartProfile", "StopProfile"}


def test_gateways_protocols_are_as_others_publish_them():
    """Each rpc and field that is here has the published name, number, type and oneof; and all fields of requests are
    here, so that none is ignored unseen."""
    import published_protos

    from cluster.serving.grpc.registration import SERVICES

    published = json.loads(published_protos.PAGE.read_text())
    ours = published_protos.described(*(service for _, service in SERVICES[1:]))
    left_out = {path for path in published["rpcs"] if path.rpartition("/")[2] in WITHOUT}
    assert ours["rpcs"] == {path: rpc for path, rpc in published["rpcs"].items() if path not in left_out}
    for name, fields in ours["messages"].items():
        assert fields == {field: published["messages"][name][field] for field in fields}, name
    requests = [rpc[0] for rpc in ours["rpcs"].values()]
    while requests:
        if (name := requests.pop()) not in REFUSED:
            assert ours["messages"][name] == published["messages"][name], name
            requests += [kind for _, kind, *_ in ours["messages"][name].values() if isinstance(kind, str)]
