"""A dense model behind gRPC: attention replicas alone serve it, every command makes sense, nothing dies unnoticed.

Each replica is two ranks that share the model, in 8 bits.
"""

import re
import subprocess

import pytest
from serving_tools import COMMAND, Serving

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.client.grpc_client import Client
from cluster.footprint.servers import servers
from cluster.types import SamplingParams as ServedParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "The old lighthouse keeper"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("dense") / "model"
    write_demo_checkpoint(model_dir, model_type="qwen2")
    return model_dir


@pytest.fixture(scope="module")
def serving(model_dir, tmp_path_factory):
    server = Serving(
        model_dir, tmp_path_factory.mktemp("server"), "--tensor-parallel-size", "2", "--quantization", "int8"
    )
    yield server.wait_ready()
    server.end()


@pytest.fixture(scope="module")
def ray_address(serving):
    [address] = [s.ray_address for s in servers() if s.grpc_address.endswith(f":{serving.grpc_port}")]
    return address


@pytest.fixture
def run(ray_address):
    """A command at this server: (exit code, stdout, stderr)."""

    def run(name, *arguments):
        done = subprocess.run(
            [*COMMAND, name, "--ray-address", ray_address, *arguments], capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_its_tokens_are_those_of_an_llm(serving, model_dir):
    params = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 20, "ignore_eos": True}
    with LLM(model_dir, dtype="float32", device="cpu", kv_cache_bytes=4 << 20, quantization="int8") as llm:
        [expected] = llm.generate(PROMPT, SamplingParams(**params))
    with Client(f"127.0.0.1:{serving.grpc_port}") as client:
        assert client.is_serving(10.0)
        assert client.model_info().num_experts == 0
        answer = "".join(piece.text for piece in client.stream(PROMPT, ServedParams(**params)))
    assert answer == expected.text


def test_what_it_says_of_itself_names_no_shards(serving, run):
    """The server started with --expert-shards 1."""
    assert "experts  none: the model is dense" in serving.out.read_text()
    code, status, _ = run("status")
    assert code == 0
    assert "SERVING   dense model" in status
    assert re.search(r"│ 0 +│ \d+,", status)  # a replica has several processes
    assert "shard" not in status


@pytest.mark.parametrize("command", [("scale", "--expert-shards", "2"), ("rebalance",)])
def test_what_only_shards_can_do_is_refused(run, command):
    code, _, error = run(*command)
    assert code == 2
    assert error == "moe-cluster: this model is dense: it has no expert shards, attention replicas alone serve it\n"


def test_the_controller_is_rolled_and_more_replicas_start(run):
    assert run("roll")[:2] == (0, "the controller has a new process\n")
    assert run("scale", "--attention-replicas", "2")[0] == 0
    assert "expert" not in run("status")[1]


def test_whatever_dies_no_answer_is_lost_or_different(serving, run):
    """Two replicas now. The test asks for all kinds of faults; the cluster leaves those of shards out."""
    address = ("--address", f"127.0.0.1:{serving.grpc_port}")
    code, report, error = run("chaos", "--requests", "12", "--faults", "4", "--concurrency", "3", *address)
    assert code == 0, report + error
    assert "failed            0\ndifferent         0\n" in report
    assert "kill-replica" in report
    assert "kill-rank" in report
    assert "shard" not in report
    assert "the model is dense, it has no shards: left out kill-shard, stop-shard, cut-streams" in error


def test_its_server_is_measured_beside_an_llm(serving, model_dir):
    arguments = ["--requests", "4", "--concurrency", "2", "--output-tokens", "8", "--offline", str(model_dir)]
    command = [*COMMAND, "bench", "serve", "--address", f"127.0.0.1:{serving.grpc_port}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "0 failed, 0 refused" in done.stdout
    assert "served / offline" in done.stdout
