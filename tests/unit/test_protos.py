"""The generated code is that of protos/, and importable where it is."""

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


def test_requests_of_both_generate_rpcs_have_the_same_fields():
    from cluster.pb.moecluster.v1 import inference_pb2 as pb

    def fields(message):
        return [(f.number, f.name, f.type) for f in message.DESCRIPTOR.fields]

    assert fields(pb.GenerateRequest) == fields(pb.GenerateStreamRequest)


def test_sampling_fields_are_those_of_the_type_and_numbers_are_optional():
    from dataclasses import fields

    from cluster.pb.moecluster.v1 import inference_pb2 as pb
    from cluster.types import SamplingParams

    proto = pb.SamplingParams.DESCRIPTOR.fields
    assert [f.name for f in fields(SamplingParams)] == [f.name for f in proto]
    plain = {f.name for f in proto if not f.has_presence}
    assert plain == {"stop", "stop_token_ids", "ignore_eos", "logit_bias"}
