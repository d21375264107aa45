"""The benchmark's arithmetic on a system whose speed is known."""

import dataclasses
from typing import Any

import pytest

from cluster.bench.sampling import GREEDY, SAMPLINGS, Sampling
from cluster.bench.throughput import (
    Point,
    Prompts,
    Spread,
    Timing,
    Workload,
    measure,
    measure_in_turns,
    summarize,
)
from cluster.errors import ClusterError, SetupError

WORKLOAD = Workload(batches=(1, 4), prompt_tokens=8, output_tokens=5, repeats=3, vocab_size=100)


class FakeSystem:
    """Takes 2 s for the prompts and 1 s for each further token of all of them; +1 s on the prompts of a warm-up."""

    detail = "a fake"

    def __init__(self, missing: int = 0) -> None:
        self.now = 0.0
        self.samplings: list[str] = []
        self.calls: list[tuple[int, int]] = []
        self.seen: list[tuple[int, ...]] = []
        self.missing = missing

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        self.samplings.append(sampling.name)
        warming_up = all(batch != len(prompts) for batch, _ in self.calls[:-1])
        self.calls.append((len(prompts), num_tokens))
        self.seen += [tuple(prompt) for prompt in prompts]
        self.now += 2.0 + (num_tokens - 1) * 1.0 + warming_up
        return [num_tokens - self.missing] * len(prompts)

    def close(self) -> None:
        pass


def test_prefill_and_decode_are_timed_apart_after_a_warm_up() -> None:
    """Batch 4: prefill 4 · 8 / 2 s = 16 tokens/s; decode 4 · (5 − 1) / (6 − 2) s = 4 tokens/s. Batch 1: a quarter."""
    system = FakeSystem()
    advanced: list[int] = []
    points = measure(system, WORKLOAD, lambda: system.now, lambda run: advanced.append(run.batch))
    assert points == (
        Point(batch=1, prefill=Spread(4.0, 4.0, 4.0), decode=Spread(1.0, 1.0, 1.0)),
        Point(batch=4, prefill=Spread(16.0, 16.0, 16.0), decode=Spread(4.0, 4.0, 4.0)),
    )
    assert system.calls == [(1, 1), (1, 5)] * 4 + [(4, 1), (4, 5)] * 4
    assert advanced == [1] * 4 + [4] * 4
    assert len(advanced) == WORKLOAD.num_runs


def test_systems_that_take_turns_are_measured_like_alone() -> None:
    """The third one stops early: it has no figures, the others have theirs."""
    systems = [FakeSystem(), FakeSystem(), FakeSystem(missing=1)]
    rests: list[None] = []
    found = measure_in_turns(
        systems, WORKLOAD, lambda: sum(s.now for s in systems), lambda system, run: None, lambda: rests.append(None)
    )
    alone = FakeSystem()
    points = measure(alone, WORKLOAD, lambda: alone.now, lambda run: None)
    assert found[0] == found[1] == points
    assert isinstance(found[2], ClusterError)
    assert systems[0].seen == alone.seen
    assert len(rests) == 2 * WORKLOAD.num_runs + 1


def test_prompts_are_the_same_for_every_system_and_never_used_twice() -> None:
    first, second = FakeSystem(), FakeSystem()
    for system in (first, second):
        measure(system, WORKLOAD, lambda system=system: system.now, lambda run: None)
    assert first.seen == second.seen
    assert len(set(first.seen)) == len(first.seen) == 8 * 1 + 8 * 4
    assert {len(prompt) for prompt in first.seen} == {8}
    assert all(0 <= token_id < 100 for prompt in first.seen for token_id in prompt)


def test_samplings_take_turns_and_each_has_figures_of_its_own() -> None:
    """Two samplings: each batch size has a warm-up and 3 repeats of both, in turns, and no prompt twice."""
    workload = dataclasses.replace(WORKLOAD, samplings=(GREEDY, SAMPLINGS["chat"]))
    system = FakeSystem()
    points = measure(system, workload, lambda: system.now, lambda run: None)
    assert [(point.batch, point.sampling) for point in points] == [
        (1, "greedy"), (1, "chat"), (4, "greedy"), (4, "chat"),
    ]  # fmt: skip
    assert {point.decode.median for point in points if point.batch == 4} == {4.0}
    assert system.samplings == ["greedy", "greedy", "chat", "chat"] * 8
    assert len(set(system.seen)) == len(system.seen) == 2 * (8 * 1 + 8 * 4)
    assert len(system.calls) == 2 * workload.num_runs


def test_the_summary_is_median_and_range_of_the_repeats() -> None:
    """Batch 2, P = 8, M = 5: prefill 16 / (1, 2, 4) s, decode 8 / (4, 1, 2) s."""
    timings = [Timing(1.0, 5.0), Timing(2.0, 3.0), Timing(4.0, 6.0)]
    point = summarize(timings, WORKLOAD, batch=2)
    assert point == Point(batch=2, prefill=Spread(8.0, 4.0, 16.0), decode=Spread(4.0, 2.0, 8.0))


def test_a_system_that_stops_early_is_refused() -> None:
    system = FakeSystem(missing=1)
    with pytest.raises(ClusterError, match="nothing was measured"):
        measure(system, WORKLOAD, lambda: system.now, lambda run: None)


def test_a_decode_too_short_to_time_asks_for_more_tokens() -> None:
    with pytest.raises(SetupError, match=r"at batch 1 5 tokens .* --output-tokens"):
        summarize([Timing(2.0, 2.0)], WORKLOAD, batch=1)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"batches": ()}, "--batch"),
        ({"batches": (0, 1)}, "--batch"),
        ({"batches": (8, 1)}, "--batch"),
        ({"prompt_tokens": 0}, "--prompt-tokens is 0"),
        ({"output_tokens": 1}, "--output-tokens is 1, at least 2"),
        ({"repeats": 0}, "--repeat is 0"),
    ],
)
def test_an_impossible_workload_names_the_option(change: dict[str, Any], option: str) -> None:
    with pytest.raises(SetupError, match=option):
        dataclasses.replace(WORKLOAD, **change)
