"""Results of numbers while an attention replica dies under them: none fails, and none differs."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served_tools import wait_until

from cluster import LLM
from cluster.chaos.faults import inject
from cluster.client.grpc_client import Client
from cluster.runtime.operate import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

PROMPTS = [[(7 * start + step) % 900 for step in range(40 + 60 * start)] for start in range(6)]


def processes(cluster):
    return {part.process for part in cluster.parts() if part.role in ("shard", "replica")}


@pytest.fixture(scope="module")
def expected(demo_checkpoint):
    """Each prompt's log probabilities, of one process."""
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        return [found.logprobs.tolist() for found in llm.prompt_logprobs(PROMPTS)]


@pytest.mark.parametrize("kind", ["kill-replica", "stop-replica", "kill-shard"])
def test_scores_go_on_elsewhere_when_their_engine_dies(served, expected, kind):
    over, answers, faults = threading.Event(), [], []

    def ask(number):
        with Client(f"127.0.0.1:{served.grpc_port}") as client:
            while not over.is_set():
                for place in range(number, number + len(PROMPTS)):
                    place %= len(PROMPTS)
                    begun = time.monotonic()
                    answers.append((place, list(client.score(PROMPTS[place]).logprobs), begun, time.monotonic()))

    def places_since(at):
        return {place for place, _, begun, _ in list(answers) if begun > at}

    with RunningCluster() as cluster, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, number) for number in range(4)]
        try:
            for seed in range(2):
                before = processes(cluster)
                faults.append(inject(kind, cluster, random.Random(seed), 2, 120.0))
                assert before - processes(cluster) or kind == "stop-replica"
            wait_until(lambda: len(places_since(faults[-1].at)) == len(PROMPTS), "an answer to each prompt")
        finally:
            over.set()
        for one in asking:
            one.result()  # raises what a call raised
    for fault in faults:
        until = fault.at + fault.recovered_s
        assert [1 for _, _, begun, ended in answers if begun < until and ended > fault.at], f"none during {fault.what}"
    for place, logprobs, _, _ in answers:
        assert logprobs == pytest.approx(expected[place], abs=1e-4)
