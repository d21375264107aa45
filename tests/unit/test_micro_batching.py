"""How a step is split, and when."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.micro_batching import MIN_TOKENS, RETRY_STEPS, TRIES, MicroBatching, split_evenly


def run(micro_batching, steps, seconds, num_tokens=512, num_sequences=8):
    chosen = []
    for _ in range(steps):
        parts = micro_batching.choose(num_tokens, num_sequences)
        micro_batching.record(num_tokens, num_sequences, parts, seconds[parts])
        chosen.append(parts)
    return chosen


@pytest.mark.parametrize(("seconds", "faster"), [({1: 0.5, 2: 0.3}, 2), ({1: 0.3, 2: 0.5}, 1)])
def test_the_faster_way_is_found_and_kept(seconds, faster):
    chosen = run(MicroBatching(enabled=True), 50, seconds)
    assert sorted(chosen[: 2 * TRIES]) == [1] * TRIES + [2] * TRIES
    assert set(chosen[2 * TRIES :]) == {faster}


def test_the_slower_way_is_tried_again_and_taken_once_it_is_faster():
    micro_batching = MicroBatching(enabled=True)
    run(micro_batching, 20, {1: 0.3, 2: 0.5})
    chosen = run(micro_batching, 4 * RETRY_STEPS, {1: 0.3, 2: 0.1})
    assert chosen.count(2) >= 2
    assert chosen[-1] == 2


def test_sizes_are_told_apart():
    micro_batching = MicroBatching(enabled=True)
    run(micro_batching, 20, {1: 0.3, 2: 0.5}, num_tokens=2048)
    assert set(run(micro_batching, 20, {1: 0.5, 2: 0.3}, num_tokens=64)[2 * TRIES :]) == {2}


@pytest.mark.parametrize(
    ("enabled", "num_tokens", "num_sequences"), [(False, 512, 8), (True, MIN_TOKENS - 1, 8), (True, 512, 1)]
)
def test_what_cannot_gain_is_never_split(enabled, num_tokens, num_sequences):
    assert set(run(MicroBatching(enabled=enabled), 20, {1: 1.0, 2: 0.1}, num_tokens, num_sequences)) == {1}


@given(st.lists(st.integers(1, 50), min_size=2, max_size=20))
def test_a_split_keeps_all_sequences_in_order_and_leaves_no_part_empty(lengths):
    scheduled = [SimpleNamespace(num_rows=length) for length in lengths]
    parts = split_evenly(scheduled, 2)
    assert [s for part in parts for s in part] == scheduled
    assert [len(part) > 0 for part in parts] == [True, True]
    sums = [sum(s.num_rows for s in part) for part in parts]
    assert abs(sums[0] - sums[1]) <= 2 * max(lengths)
