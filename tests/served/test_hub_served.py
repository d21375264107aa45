"""`moe-cluster serve` by a name, against a hub on loopback: each process fetches its files, once for the node.

Its engine guesses tokens ahead, which changes no answer."""

import os
import re
import signal
import sys
from pathlib import Path

import grpc
import pytest
from serving_tools import ONE_ATTEMPT, Serving, command

from cluster.client.direct import read_url
from cluster.footprint.processes import members
from cluster.llm import LLM
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from hub_server import DENSE, EXPERTS, FIRST, NAME, SMALL, repository_of, serve, write_in_parts

pytestmark = pytest.mark.slow  # a cluster of its own

PROMPT, NUM_TOKENS = list(range(5, 25)), 120
NGRAM = '{"method": "ngram", "num_speculative_tokens": 4}'


def answer(serving):
    params = pb.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=params)
    with grpc.insecure_channel(f"127.0.0.1:{serving.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return list(stub.Generate(request, timeout=120).token_ids), stub.GetModelInfo(pb.GetModelInfoRequest()).model_id


def guessed(serving):
    """Tokens that were guessed and tried, and those of them that were right."""
    text = read_url(serving.metrics, timeout_s=60.0)
    return [
        float(re.search(rf"^moecluster_engine_{kind}_tokens_total{{.*}} (\S+)$", text, re.MULTILINE)[1])
        for kind in ("drafted", "accepted")
    ]


@pytest.mark.timeout(600)
def test_shards_fetch_their_files_and_come_again_without_the_hub(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_in_parts(checkpoint)
    with LLM(checkpoint, dtype="float32") as llm:
        [output] = llm.generate([PROMPT], {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True})
    with serve({NAME: repository_of(checkpoint)}) as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        options = ["--expert-shards", "2", "--speculative-config", NGRAM]
        serving = Serving(NAME, tmp_path, *options, environment=environment)
        try:
            serving.wait_ready()
            assert answer(serving) == (list(output.token_ids), NAME)
            drafted, accepted = guessed(serving)
            assert drafted >= accepted > 0
            assert hub.fetched(".safetensors") == [DENSE, *EXPERTS]
            assert sorted(set(hub.fetched())) == sorted({*SMALL, DENSE, *EXPERTS})
            hub.status, calls = 503, len(hub.calls)
            for pid in members(serving.folder):
                if "ExpertShardActor" in command(pid)[0]:
                    os.kill(pid, signal.SIGKILL)
            assert answer(serving) == (list(output.token_ids), NAME)
            assert len(hub.calls) == calls, "the commit's files were in the cache"
            assert list((tmp_path / "home").rglob(f"snapshots/{FIRST}/config.json"))
            serving.process.send_signal(signal.SIGINT)
            assert serving.process.wait(60) == 0
        finally:
            serving.end()


@pytest.mark.timeout(600)
def test_a_file_that_a_shard_cannot_fetch_ends_the_start_with_its_reason(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_in_parts(checkpoint)
    with serve({NAME: repository_of(checkpoint)}) as hub:
        hub.refused = EXPERTS[1]
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), **ONE_ATTEMPT}
        serving = Serving(NAME, tmp_path, "--expert-shards", "2", environment=environment)
        try:
            assert serving.process.wait(300) == 2
            last = serving.err.read_text().strip().splitlines()[-1]
            assert f"{EXPERTS[1]} is not in it" in last
        finally:
            serving.end()
