"""Experts on other hosts: over TCP, and when a host is cut off, comes back, or dies."""

import json
import sys
import time

import pytest
from hosts import hosts, needs_namespaces, read_line

from cluster import LLM, SamplingParams

pytestmark = [pytest.mark.slow, needs_namespaces]

PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5], list(range(40))]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
THROUGH_FAULTS = """
import json, sys
import ray
from cluster.checkpoint.generation import read_sampling_defaults
from cluster.config import ClusterConfig
from cluster.engine.load import load_engine
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry
from cluster.runtime.start.offline import RayExperts
from cluster.runtime.names import NAMESPACE
from cluster.types import SAMPLING_DEFAULTS, EngineRequest, SamplingParams
address, model_dir, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
config = ClusterConfig(model=model_dir, expert_shards=2, min_copies=2, kv_cache_bytes=1 << 22, recovery_timeout_s=90.0)
registry = new_registry()
experts = RayExperts(config, DispatchMetrics(registry, "test"))
engine = load_engine(
    model_dir, config.engine(), experts.dispatcher, EngineMetrics(registry, "test"), remote_experts=True
)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
params = params.with_defaults(read_sampling_defaults(model_dir)).with_defaults(SAMPLING_DEFAULTS)
number = 0
while True:
    tokens = {}
    for i, prompt in enumerate(prompts):
        engine.submit(EngineRequest(request_id=f"{number}-{i}", prompt_token_ids=tuple(prompt), params=params))
        tokens[f"{number}-{i}"] = []
    while engine.has_work:
        for update in engine.step():
            if update.error is not None:
                raise update.error
            tokens[update.request_id] += update.token_ids
    try:
        shards = ray.get(experts._controller.status.remote(), timeout=1.0).shards
        nodes = sorted(shard.process.node_id for shard in shards if shard.state == "up")
    except ray.exceptions.RayError:
        nodes = []  # the controller is on the host that is away
    families = [connection._sock.family.name for _, connection in experts._transport._connections.values()]
    result = {"tokens": list(tokens.values()), "nodes": nodes, "families": families}
    print(json.dumps(result), flush=True)
    number += 1
"""


@pytest.fixture(scope="module")
def expected(demo_checkpoint):
    with LLM(demo_checkpoint, kv_cache_bytes=1 << 22, skip_tokenizer=True) as llm:
        return [list(output.token_ids) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def net():
    with hosts(3) as made:
        yield made


def test_round_trips_to_another_host_are_measured(net, tmp_path):
    file = tmp_path / "transport.json"
    bench = [sys.executable, "-m", "cluster.cli", "bench", "transport", "--ray-address", net.address]
    done = net.run(0, *bench, "--json", str(file), "--rows", "8", "--repeat", "20")
    assert done.returncode == 0, done.stderr
    assert {entry["carrier"] for entry in json.loads(file.read_text())} == {"ray", "stream, TCP"}


@pytest.mark.chaos
def test_a_host_that_is_cut_off_slowed_and_dies_changes_no_token(net, expected, demo_checkpoint):
    """Every expert is on both hosts with room. A cut link causes no error; a killed raylet takes its shard along."""
    driver = net.popen(0, sys.executable, "-c", THROUGH_FAULTS, net.address, str(demo_checkpoint), json.dumps(PROMPTS))

    def rounds(seconds):
        """The driver's rounds of prompts meanwhile; the last of at least two has begun under the fault."""
        results, until = [], time.monotonic() + seconds
        while time.monotonic() < until or len(results) < 2:
            results.append(json.loads(read_line(driver)))
            assert results[-1]["tokens"] == expected
        return results

    try:
        whole = rounds(1.0)[-1]
        assert len(set(whole["nodes"])) == 2
        assert whole["families"] == ["AF_INET", "AF_INET"]
        with net.cut_off(2):
            rounds(4.0)
        rounds(2.0)
        with net.slowed(2):
            rounds(3.0)
        net.kill_raylet(2)
        rounds(2.0)
        deadline = time.monotonic() + 60
        nodes = []
        while (len(nodes), len(set(nodes))) != (2, 1):  # at first nobody may have noticed
            assert time.monotonic() < deadline, "its shard did not come up on the other host"
            nodes = rounds(0.5)[-1]["nodes"]
    finally:
        driver.kill()
        driver.wait()
