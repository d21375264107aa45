"""A dense model behind gRPC: attention replicas alone serve it, every command makes sense, nothing dies unnoticed.

Each replica is two ranks that share the model, in 8 bits, and its adapter. Then a MoE model whose replicas are ranks.
"""

import re
import subprocess
from functools import partial

import httpx2
import pytest
from lora_tools import write_adapter_of
from serving_tools import COMMAND, Serving

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.client.grpc_client import Client
from cluster.footprint.servers import servers
from cluster.serving.admission.api_keys import new_key
from cluster.types import SamplingParams as ServedParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "The old lighthouse keeper"
PARAMS = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 20, "ignore_eos": True}
CHANGED = ("q_proj", "o_proj", "down_proj")  # by outputs, and by inputs; of routed experts too


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("dense") / "model"
    write_demo_checkpoint(model_dir, model_type="qwen2")
    return model_dir


@pytest.fixture(scope="module")
def law(model_dir):
    return write_adapter_of(model_dir.parent / "law", model_dir, *CHANGED)


@pytest.fixture(scope="module")
def serving(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    key, line = new_key("root")
    (folder / "admins").write_text(f"{line}\n")
    options = ["--tensor-parallel-size", "2", "--quantization", "int8", "--admin-keys-file", str(folder / "admins")]
    server = Serving(model_dir, folder, *options)
    server.admin_key = key
    yield server.wait_ready()
    server.end()


def run_at(serving, name, *arguments):
    """A command at a server: (exit code, stdout, stderr)."""
    [address] = [s.ray_address for s in servers() if s.grpc_address.endswith(f":{serving.grpc_port}")]
    command = [*COMMAND, name, "--ray-address", address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(serving):
    return partial(run_at, serving)


def answer(serving, adapter):
    with Client(f"127.0.0.1:{serving.grpc_port}", adapter=adapter) as client:
        assert client.is_serving(10.0)
        return "".join(piece.text for piece in client.stream(PROMPT, ServedParams(**PARAMS)))


def expected(model_dir, law, **options):
    """Of one process: with the adapter and without."""
    options = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 4 << 20, "lora_adapters": {"law": law}, **options}
    with LLM(model_dir, **options) as llm:
        return [output.text for output in llm.generate([PROMPT] * 2, SamplingParams(**PARAMS), adapter=["law", ""])]


def test_its_tokens_are_those_of_an_llm(serving, model_dir, law):
    """With an adapter that is loaded while it serves, and without."""
    with Client(f"127.0.0.1:{serving.grpc_port}") as client:
        assert client.model_info().num_experts == 0
    [url] = re.findall(r"HTTP     (http\S+/v1)", serving.out.read_text())
    loaded = httpx2.post(
        f"{url}/load_lora_adapter", json={"lora_name": "law", "lora_path": str(law)},
        headers={"authorization": f"Bearer {serving.admin_key}"}, timeout=60,
    )  # fmt: skip
    assert loaded.status_code == 200, loaded.text
    adapted, plain = expected(model_dir, law, quantization="int8")
    assert adapted != plain
    assert [answer(serving, name) for name in ("law", "")] == [adapted, plain]


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
    options = ("--address", f"127.0.0.1:{serving.grpc_port}", "--adapter", "law")
    code, report, error = run("chaos", "--requests", "12", "--faults", "4", "--concurrency", "3", *options)
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


def test_a_moe_models_streams_go_on_when_a_rank_of_a_replica_dies(demo_checkpoint, tmp_path):
    """Rank 0 has the router, the way to the shards and their part of the adapter."""
    law = write_adapter_of(tmp_path / "law", demo_checkpoint, *CHANGED)
    options = ["--tensor-parallel-size", "2", "--attention-replicas", "2", "--lora-adapters", f"law={law}"]
    serving = Serving(demo_checkpoint, tmp_path, *options)
    try:
        serving.wait_ready()
        assert [answer(serving, name) for name in ("law", "")] == expected(demo_checkpoint, law)
        options = ["--kinds", "kill-rank", "--address", f"127.0.0.1:{serving.grpc_port}"]
        options += ["--adapter", "law", "--requests", "6", "--faults", "1", "--concurrency", "3"]
        code, report, error = run_at(serving, "chaos", *options)
        assert code == 0, report + error
        assert "failed            0\ndifferent         0\n" in report
        assert "kill-rank" in report
    finally:
        serving.end()
