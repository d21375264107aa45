"""The choice of an expert's copy for a row: the step's rows are evened out over the shards."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.experts.eplb import rebalance
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.experts.route import Route, fill
from cluster.experts.transport import NOT_HERE


def plan_of(*owners, down=()):
    """Layer 0 of a plan, from each expert's shards."""
    num_shards = 1 + max(max(shards) for shards in owners)
    slices = tuple({0: tuple(e for e, shards in enumerate(owners) if s in shards)} for s in range(num_shards))
    return PlacementPlan(epoch=1, num_experts=len(owners), slices=slices, down=frozenset(down))


def route_of(plan, avoid=(), suspected=()):
    return Route(plan, 0, frozenset(avoid), frozenset(suspected))


def rows_of(shards, num_shards):
    """The (token, expert) pairs of each shard."""
    return np.bincount(shards[shards >= 0], minlength=num_shards)


@st.composite
def cases(draw):
    num_shards = draw(st.integers(1, 5))
    owners = draw(
        st.lists(st.sets(st.integers(0, num_shards - 1), min_size=1), min_size=1, max_size=9).map(
            lambda experts: [tuple(sorted(shards)) for shards in experts]
        )
    )
    down, avoid, suspected = (draw(st.sets(st.integers(0, num_shards - 1), max_size=2)) for _ in range(3))
    num_tokens, top_k = draw(st.integers(0, 30)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    ids = random.integers(-1, len(owners), (num_tokens, top_k))
    return owners, down, avoid, suspected, ids


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_each_slot_goes_to_the_best_kind_of_shard_that_its_expert_has(case):
    """The best kind is worked out for every slot by itself; the same ids give the same shards."""
    owners, down, avoid, suspected, ids = case
    shards = route_of(plan_of(*owners, down=down), avoid, suspected).shards(ids)
    assert shards.shape == ids.shape
    assert np.array_equal(shards, route_of(plan_of(*owners, down=down), avoid, suspected).shards(ids.copy()))
    for expert, shard in zip(ids.flatten().tolist(), shards.flatten().tolist(), strict=True):
        if expert < 0:
            assert shard == NOT_HERE
            continue
        best = set(owners[expert])
        for worse in (down, avoid, suspected):
            best = best - worse or best
        assert shard in best


@settings(max_examples=100, deadline=None)
@given(
    num_shards=st.integers(1, 6), num_experts=st.integers(1, 9), num_tokens=st.integers(0, 60), seed=st.integers(0, 99)
)
def test_where_every_shard_has_every_expert_all_have_the_same_to_do(num_shards, num_experts, num_tokens, seed):
    ids = np.random.default_rng(seed).integers(0, num_experts, (num_tokens, 2))
    rows = rows_of(route_of(plan_of(*[tuple(range(num_shards))] * num_experts)).shards(ids), num_shards)
    assert rows.max() - rows.min() <= 1


def best_largest(counts, owners, num_shards):
    """The least that the slowest shard can have, rows taken as divisible: no set of experts fits into less than its
    rows over the shards that hold any of them. By Hall's theorem that is also enough."""
    best = 0.0
    for mask in range(1, 1 << num_shards):
        inside = {s for s in range(num_shards) if mask >> s & 1}
        rows = sum(count for count, shards in zip(counts, owners, strict=True) if set(shards) <= inside)
        best = max(best, rows / len(inside))
    return best


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), num_shards=st.integers(2, 5))
def test_the_slowest_shard_has_little_more_than_the_best_assignment_gives_it(seed, num_shards):
    """Two copies of each of 16 experts. One pass is no search: it may miss the best by a third."""
    random = np.random.default_rng(seed)
    owners = [tuple(sorted(random.choice(num_shards, 2, replace=False).tolist())) for _ in range(16)]
    owners[0] = (0, num_shards - 1)  # the plan has num_shards shards
    ids = random.choice(16, (200, 2), p=(weights := 1 / np.arange(1, 17)) / weights.sum())
    rows = rows_of(route_of(plan_of(*owners)).shards(ids), num_shards)
    assert rows.sum() == 400
    assert rows.max() <= 1.34 * best_largest(np.bincount(ids.flatten(), minlength=16), owners, num_shards) + 1


def test_rows_fill_the_shards_with_least_to_do():
    """Worked out by hand: 9 rows on 1, 5 and 20 bring the first two to 8 and 7; the first of equals gets the rest."""
    work = [1, 20, 5]
    assert fill(work, (0, 2, 1), 9) == [7, 2, 0]
    assert work == [8, 20, 7]
    assert fill([3, 3, 3], (2, 0), 3) == [2, 1]
    assert fill([0, 100], (0, 1), 40) == [40, 0]
    assert fill([0, 7], (1, 0), 0) == [0, 0]


def test_an_expert_stays_whole_where_that_is_even():
    """Both experts have both shards: expert 0's three rows go to one, expert 1's three to the other, which read one
    expert each and not two."""
    shards = route_of(plan_of((0, 1), (0, 1))).shards(np.array([[0, 1]] * 3))
    assert sorted(map(tuple, shards.T.tolist())) == [(0, 0, 0), (1, 1, 1)] or rows_of(shards, 2).tolist() == [3, 3]


def test_rows_that_have_one_shard_only_count_as_work():
    """Expert 0 is on shard 0 alone and has 4 rows; expert 1's 4 rows all go to shard 1."""
    shards = route_of(plan_of((0,), (0, 1))).shards(np.array([[0, 1]] * 4))
    assert shards.tolist() == [[0, 1]] * 4


def in_turn(plan, ids):
    """The rule before: an expert's copies take its rows by their numbers."""
    owners = plan.owners(0)
    return np.array(
        [[owners[e][(row + e) % len(owners[e])] for e in experts] for row, experts in enumerate(ids.tolist())]
    )


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_uneven_steps_are_evened_out_by_the_copies(num_shards, exponent, capsys):
    """60 experts, 4 a token, popular by Zipf's law, two copies of each where the balancer puts them for the true load.
    `pytest tests/unit/test_route.py -k evened -s` prints the table of BENCHMARKS.md."""
    random = np.random.default_rng(0)
    popularity = np.arange(1, 61) ** -exponent
    random.shuffle(popularity)
    places = [120 // num_shards] * num_shards
    plan = rebalance(plan_evenly([0], 60, num_shards), popularity[None] * 1e6, shards=places, min_copies=2)
    route, line = Route(plan, 0, frozenset(), frozenset()), f"| {num_shards} | {exponent} |"
    for num_rows, num_steps in ((1, 400), (8, 200), (32, 100), (256, 40), (2048, 10)):
        before = after = 0.0
        for _ in range(num_steps):
            keys = popularity**-1.0 * random.exponential(size=(num_rows, 60))
            ids = keys.argpartition(4, axis=1)[:, :4]  # 4 experts a token, without repeats, by popularity
            mean = ids.size / num_shards
            before += rows_of(in_turn(plan, ids), num_shards).max() / mean / num_steps
            after += rows_of(route.shards(ids), num_shards).max() / mean / num_steps
        assert after <= before
        assert after <= 1.25 or num_rows < num_shards, "there are fewer rows than shards"
        line += f" {before:.2f} → {after:.2f} |"
    with capsys.disabled():
        sys.stdout.write(f"\n{line}")
