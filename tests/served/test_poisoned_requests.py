"""A request that raises in its engine, and one that ends it: streams beside them notice nothing but a pause."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import poison
import pytest

from cluster.client.grpc_client import Client
from cluster.errors import ClusterError
from cluster.runtime.operate import RunningCluster
from cluster.types import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = [5, 6, 7]


def bystander(seed):
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=300, ignore_eos=True)


def poisoned(seed):
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=50, ignore_eos=True)


def ask(served, params, request_id="", begun=None):
    """The tokens of an answer; sets `begun` with the first."""
    token_ids = []
    with Client(f"127.0.0.1:{served.grpc_port}") as client:
        for piece in client.stream(PROMPT, params, request_id=request_id):
            token_ids += piece.token_ids
            if begun is not None:
                begun.set()
    return token_ids


def ask_together(served, seeds):
    """The answers of bystanders with no poisoned request beside them."""
    with ThreadPoolExecutor(len(seeds)) as pool:
        return list(pool.map(lambda seed: ask(served, bystander(seed)), seeds))


def engines():
    with RunningCluster() as cluster:
        return {part.process for part in cluster.parts() if part.role == "replica"}


def beside(served, seeds, poisoned_params, request_id):
    """The answers of bystanders that had begun before the poisoned request, and its error."""
    begun = [threading.Event() for _ in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        answers = [
            pool.submit(ask, served, bystander(seed), "", event) for seed, event in zip(seeds, begun, strict=True)
        ]
        assert all(event.wait(60) for event in begun)
        with pytest.raises(ClusterError) as met:
            ask(served, poisoned_params, request_id)
        return [answer.result() for answer in answers], met.value


def test_a_request_that_raises_ends_alone_and_its_bystanders_stream_on(served):
    seeds = [1, 2, 3, 4]
    expected = ask_together(served, seeds)
    before = engines()
    answers, error = beside(served, seeds, poisoned(poison.RAISES), "poisoned-1")
    assert answers == expected
    assert str(error).startswith("INTERNAL: internal error, request id poisoned-1")
    assert engines() == before


def test_a_request_that_ends_its_engine_ends_two_and_its_bystanders_go_on_with_the_same_tokens(served):
    seeds = [1, 2, 3, 4]
    expected = ask_together(served, seeds)
    before = engines()
    answers, error = beside(served, seeds, poisoned(poison.KILLS), "poisoned-2")
    assert answers == expected
    assert "request poisoned-2 is not tried again: 2 attention replicas died in a row" in str(error)
    assert "the last one with nothing else in its step" in str(error)
    deadline = time.monotonic() + 120
    while len(after := engines()) < len(before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(after) == len(before)
    assert after != before
