"""Plans from measured load: conditions that every plan keeps, balance that it reaches, DeepSeek's balancer beside it.

Loads of a shard are added up here by loops over the plan's slices, never by the code under test.
"""

import numpy as np
import pytest
from eplb_reference import layer_cost, rebalance_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import SetupError
from cluster.experts.eplb import PhysicalExpert, imbalance, moves, rebalance
from cluster.experts.load_meter import LoadMeter
from cluster.experts.placement import PlacementPlan, plan_evenly

TOLERANCE = 1 + 1e-9


def shard_loads(plan, load, layer):
    """One layer's load on each shard."""
    owners = plan.owners(plan.layer_ids[layer])
    return [
        sum(load[layer][expert] / len(shards) for expert, shards in enumerate(owners) if shard_id in shards)
        for shard_id in range(plan.num_shards)
    ]


def cost(plan, load):
    return sum(max(shard_loads(plan, load, layer)) for layer in range(len(plan.layer_ids)))


def num_held(plan, shard_id):
    return sum(len(experts) for experts in plan.slices[shard_id].values())


def zipf_load(num_layers, num_experts, exponent, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(1, num_experts + 1.0) ** -exponent) for _ in range(num_layers)])


def four_hot_load(num_layers, num_experts, seed=0):
    """Four experts of each layer have half of its load."""
    rng = np.random.default_rng(seed)
    load = np.ones((num_layers, num_experts))
    for row in load:
        row[rng.choice(num_experts, 4, replace=False)] = (num_experts - 4) / 4
    return load


@st.composite
def cases(draw):
    """Any plan (uneven, with copies to spare, sparse layer ids), any load, any shards: more, fewer, too small."""
    layer_ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    num_experts = draw(st.integers(1, 12))
    num_shards = draw(st.integers(1, 5))
    held = st.sets(st.integers(0, num_shards - 1), min_size=1)
    owners = {layer_id: [draw(held) for _ in range(num_experts)] for layer_id in layer_ids}
    slices = tuple(
        {layer_id: tuple(e for e in range(num_experts) if shard_id in owners[layer_id][e]) for layer_id in layer_ids}
        for shard_id in range(num_shards)
    )
    plan = PlacementPlan(epoch=draw(st.integers(1, 9)), num_experts=num_experts, slices=slices)
    one_load = st.one_of(st.just(0.0), st.floats(0.01, 1000))
    size = len(layer_ids) * num_experts
    load = np.array(draw(st.lists(one_load, min_size=size, max_size=size))).reshape(-1, num_experts)
    capacity = st.one_of(st.just(0), st.integers(1, size + 3))
    shards = draw(st.lists(capacity, min_size=num_shards, max_size=num_shards + 3))
    return plan, load, shards, draw(st.integers(1, 3))


@given(cases(), st.none() | st.integers(0, 20))
@settings(max_examples=300, deadline=None)
def test_every_plan_keeps_copies_capacities_and_moves_or_is_refused(case, max_moves):
    """A call is refused exactly when the places are too few; a shard counts at most one for each expert of a layer.
    Every other arrangement is possible (Gale-Ryser, with equal demands)."""
    plan, load, shards, min_copies = case
    copies = min(min_copies, sum(capacity > 0 for capacity in shards))
    if not copies or sum(min(capacity, load.size) for capacity in shards) < load.size * copies:
        with pytest.raises(SetupError, match="add shards or memory"):
            rebalance(plan, load, shards=shards, min_copies=min_copies)
        return
    new = rebalance(plan, load, shards=shards, min_copies=min_copies, max_moves=max_moves, min_gain=0.0)
    again = rebalance(plan, load, shards=shards, min_copies=min_copies, max_moves=max_moves, min_gain=0.0)
    assert new == again

    assert new.layer_ids == plan.layer_ids
    for layer_id in new.layer_ids:
        assert all(len(shards) >= copies for shards in new.owners(layer_id))
    assert all(num_held(new, shard_id) <= shards[shard_id] for shard_id in range(new.num_shards))
    assert all(len(set(experts)) == len(experts) for s in new.slices for experts in s.values())

    needed = rebalance(plan, load, shards=shards, min_copies=min_copies, max_moves=0, min_gain=1.0)
    if max_moves is not None:
        assert len(moves(plan, new).added) <= max(max_moves, len(moves(plan, needed).added))
    assert cost(new, load) <= cost(needed, load) * TOLERANCE
    if new is plan:
        assert all(num_held(plan, shard_id) <= shards[shard_id] for shard_id in range(plan.num_shards))
    else:
        assert new.epoch == plan.epoch + 1
        assert new.num_shards == len(shards)
        assert moves(plan, new).added or moves(plan, new).dropped


@given(cases())
@settings(max_examples=100, deadline=None)
def test_a_plan_that_fits_never_gets_worse(case):
    plan, load, _, _ = case
    shards = [num_held(plan, shard_id) for shard_id in range(plan.num_shards)]
    new = rebalance(plan, load, shards=shards, min_gain=0.0)
    assert cost(new, load) <= cost(plan, load) * TOLERANCE
    assert new is plan or cost(new, load) < cost(plan, load)


@given(cases(), st.floats(0.01, 0.5))
@settings(max_examples=100, deadline=None)
def test_a_plan_changes_for_no_less_than_the_smallest_gain(case, min_gain):
    plan, load, _, _ = case
    shards = [num_held(plan, shard_id) + 2 for shard_id in range(plan.num_shards)]
    new = rebalance(plan, load, shards=shards, min_gain=min_gain)
    assert new is plan or cost(new, load) <= cost(plan, load) * (1 - min_gain) * TOLERANCE


@pytest.mark.parametrize("skew", ["zipf", "four hot"])
@pytest.mark.parametrize(
    ("num_experts", "capacities"),
    [
        (64, [10 * 6] * 8),
        (60, [11 * 6] * 7),
        (64, [24 * 6] * 3),
        (60, [80, 40, 70, 55, 61, 67, 73]),  # each as it is, 1.24 copies of an expert in all
    ],
)
def test_skewed_load_is_spread_where_there_is_room(num_experts, capacities, skew):
    load = zipf_load(6, num_experts, 1.0) if skew == "zipf" else four_hot_load(6, num_experts)
    plan = plan_evenly(range(6), num_experts, len(capacities))
    mean = load.sum() / len(capacities)
    assert cost(plan, load) / mean > 1.15
    new = rebalance(plan, load, shards=capacities)
    assert cost(new, load) / mean <= 1.15
    assert imbalance(new, load) == pytest.approx(cost(new, load) / mean)
    assert rebalance(new, load, shards=capacities) is new


def test_one_hot_expert_gets_the_copies():
    """Shard 0 computes 9 + 1, shard 1 2: of 12, the hot expert's 9 halved and one more moved leave 6 on each."""
    plan = PlacementPlan(epoch=4, num_experts=4, slices=({7: (0, 1)}, {7: (2, 3)}))
    new = rebalance(plan, [[9, 1, 1, 1]], shards=[3, 3])
    assert moves(plan, new).added[0] == PhysicalExpert(7, 0, 1)
    assert cost(new, [[9, 1, 1, 1]]) == 6
    assert new.epoch == 5


def test_the_steps_that_gain_most_come_first():
    """Layer 0 gains 4 by one move, layer 1 gains 40: a budget of one goes to layer 1."""
    slices = ({0: (0, 1), 1: (0, 1)}, {0: (2, 3), 1: (2, 3)})
    plan = PlacementPlan(epoch=1, num_experts=4, slices=slices)
    load = [[4, 4, 0, 0], [40, 40, 0, 0]]
    new = rebalance(plan, load, shards=[6, 6], max_moves=1)
    (added,) = moves(plan, new).added
    assert (added.layer_id, added.shard_id) == (1, 1)
    assert cost(new, load) == 8 + 40


@pytest.mark.parametrize(
    "load", [np.ones((2, 64)), np.zeros((2, 64)), np.tile([5.0] * 8 + [0.0] * 8, (2, 4))], ids=["even", "none", "half"]
)
def test_a_balanced_plan_comes_back_as_it_is(load):
    plan = plan_evenly([0, 1], 64, 4)
    assert rebalance(plan, load, shards=[64] * 4, min_gain=0.0) is plan


def test_layers_that_fill_one_shard_each_are_exchanged_at_once():
    """No shard has room for one more expert, so neither layer can be spread without the other."""
    everything = tuple(range(6))
    plan = PlacementPlan(epoch=1, num_experts=6, slices=({0: everything}, {1: everything}))
    load = np.ones((2, 6))
    new = rebalance(plan, load, shards=[6, 6])
    assert cost(plan, load) == 12
    assert cost(new, load) == 6
    assert len(moves(plan, new).added) == 6


def test_a_hot_layer_gets_the_places_that_others_leave():
    """A shard has one free place for three layers. Layer 0, the only skewed one, takes three of four: 16 becomes 4."""
    plan = plan_evenly([0, 1, 2], 8, 4)
    load = np.array([[16.0, 0, 0, 0, 0, 0, 0, 0], [1.0] * 8, [1.0] * 8])
    new = rebalance(plan, load, shards=[7] * 4)
    assert moves(plan, new).added == tuple(PhysicalExpert(0, 0, shard_id) for shard_id in (1, 2, 3))
    assert cost(new, load) == 4 + 2 + 2


def test_an_emptied_shard_hands_its_experts_on_whatever_max_moves_says():
    plan = plan_evenly([3, 5], 60, 6)
    new = rebalance(plan, np.ones((2, 60)), shards=[30, 30, 0, 30, 30, 30], max_moves=0)
    assert new.slices[2] == {}
    change = moves(plan, new)
    assert len(change.added) == len(change.dropped) == 20
    assert {dropped.shard_id for dropped in change.dropped} == {2}
    assert imbalance(new, np.ones((2, 60))) == 1.0  # 12 on each of the other 5


def test_a_new_shard_takes_its_part_and_nothing_else_moves():
    """64 on 7 shards, 10 or 9 each; an eighth takes 8 of them, a place in each layer for each that comes."""
    plan = plan_evenly(range(4), 64, 7)
    new = rebalance(plan, np.ones((4, 64)), shards=[40] * 8)
    assert imbalance(new, np.ones((4, 64))) <= 1.13
    assert {added.shard_id for added in moves(plan, new).added} == {7}
    assert len(moves(plan, new).added) <= 4 * 8


def test_a_small_new_shard_takes_what_it_holds():
    plan = plan_evenly([0], 16, 2)
    new = rebalance(plan, np.ones((1, 16)), shards=[16, 16, 2])
    assert num_held(new, 2) == 2
    assert cost(new, np.ones((1, 16))) == 7


def test_min_copies_go_to_different_shards_at_one_move_each():
    plan = plan_evenly([0, 1], 12, 3)
    new = rebalance(plan, np.ones((2, 12)), shards=[20] * 3, min_copies=2)
    assert all(len(shards) == 2 for layer_id in (0, 1) for shards in new.owners(layer_id))
    assert len(moves(plan, new).added) == 24
    assert moves(plan, new).dropped == ()


def test_min_copies_are_capped_at_the_shards_that_have_room():
    plan = plan_evenly([0], 4, 2)
    new = rebalance(plan, np.ones((1, 4)), shards=[4, 0], min_copies=3)
    assert new.slices == ({0: (0, 1, 2, 3)}, {})


@pytest.mark.parametrize("shards", [[7, 7, 7, 2], [100, 11, 0, 0]], ids=["too little", "in one shard"])
def test_shards_that_cannot_hold_the_copies_are_refused(shards):
    with pytest.raises(SetupError, match=r"2 of each of 12 in 1 layers: add shards or memory, or lower --min-copies"):
        rebalance(plan_evenly([0], 12, 4), np.ones((1, 12)), shards=shards, min_copies=2)


@pytest.mark.parametrize("load", [np.ones((1, 12)), np.ones((2, 11)), np.full((2, 12), -1.0), np.full((2, 12), np.nan)])
def test_a_load_of_wrong_shape_negative_or_nan_is_refused(load):
    with pytest.raises(ValueError, match=r"give \(2, 12\)"):
        rebalance(plan_evenly([0, 1], 12, 4), load, shards=[12] * 4)


def test_capacities_for_fewer_shards_than_the_plan_has_are_refused():
    with pytest.raises(ValueError, match="0 empties a shard"):
        rebalance(plan_evenly([0], 12, 4), np.ones((1, 12)), shards=[12] * 3)


def test_a_shard_that_is_down_stays_so_in_the_new_plan():
    plan = PlacementPlan(epoch=1, num_experts=2, slices=({0: (0, 1)}, {}), down=frozenset({1}))
    assert rebalance(plan, [[1, 1]], shards=[2, 2]).down == {1}


def test_a_whole_model_on_16_shards_is_balanced():
    load = zipf_load(28, 64, 1.0)
    plan = plan_evenly(range(28), 64, 16)
    new = rebalance(plan, load, shards=[28 * 5] * 16)
    assert imbalance(plan, load) > 3.0
    assert imbalance(new, load) < 1.05


def test_moves_are_the_copies_that_only_one_plan_has():
    old = PlacementPlan(epoch=1, num_experts=2, slices=({0: (0,), 1: (0, 1)}, {0: (1,)}))
    new = PlacementPlan(epoch=2, num_experts=2, slices=({0: (0, 1), 1: (0,)}, {1: (1,)}))
    change = moves(old, new)
    assert change.added == (PhysicalExpert(0, 1, 0), PhysicalExpert(1, 1, 1))
    assert change.dropped == (PhysicalExpert(0, 1, 1), PhysicalExpert(1, 1, 0))


def test_imbalance_adds_up_the_slowest_shards_of_the_layers():
    """Expert 0 is on both shards. Layer 0: 4 / 2 + 2 and 4 / 2, of 6. Layer 1: 8 / 2 and 8 / 2 + 6, of 14."""
    plan = PlacementPlan(epoch=1, num_experts=2, slices=({0: (0, 1), 1: (0,)}, {0: (0,), 1: (0, 1)}, {}))
    load = [[4, 2], [8, 6]]
    assert imbalance(plan, load) == (4 + 10) / (3 + 7)
    assert imbalance(plan, load, num_shards=4) == (4 + 10) / (6 + 14) * 4
    assert imbalance(plan, np.zeros((2, 2))) == 1.0


def test_the_reference_gives_the_plan_that_deepseek_published():
    """The example in the README of deepseek-ai/EPLB: two layers, 16 copies of 12 experts, 4 groups, 2 nodes, 8 GPUs.

    In layer 1 half of expert 8 weighs as much as expert 9, 86, so the two may change places: loads are compared.
    """
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for loads, plan in zip(weights, published, strict=True):
        devices = rebalance_layer(loads, num_copies=16, num_groups=4, num_nodes=2, num_devices=8)
        assert sorted(expert for held in devices for expert in held) == sorted(plan)
        share = [load / plan.count(expert) for expert, load in enumerate(loads)]
        expected = [share[plan[at]] + share[plan[at + 1]] for at in range(0, 16, 2)]
        assert sorted(sum(share[expert] for expert in held) for held in devices) == pytest.approx(sorted(expected))


@st.composite
def even_cases(draw):
    """One layer, the same number of places on each shard, as the reference needs it."""
    num_shards = draw(st.integers(1, 12))
    num_experts = draw(st.integers(num_shards, 40))
    places = draw(st.integers(-(-num_experts // num_shards), min(num_experts, -(-num_experts // num_shards) + 4)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["uniform", "exponential", "zipf", "few values"]))
    load = {
        "uniform": lambda: rng.random(num_experts),
        "exponential": lambda: rng.exponential(size=num_experts),
        "zipf": lambda: zipf_load(1, num_experts, rng.uniform(0.3, 1.5), seed)[0],
        "few values": lambda: rng.integers(0, 5, num_experts).astype(float),
    }[kind]()
    return load, num_shards, places


@given(even_cases())
@settings(max_examples=200, deadline=None)
def test_a_layer_is_never_slower_than_in_the_references_plan(case):
    """Two copies of an expert on one device, which only the reference has, count as one: the load is split evenly."""
    load, num_shards, places = case
    devices = rebalance_layer(load, places * num_shards, 1, 1, num_shards)
    reference = layer_cost(load, [sorted(set(held)) for held in devices])
    new = rebalance(plan_evenly([0], len(load), num_shards), [load], shards=[places] * num_shards, min_gain=0.0)
    assert cost(new, [load]) <= reference * TOLERANCE


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize(
    ("num_experts", "num_shards", "places"),
    [(64, 16, 5), (64, 32, 3), (64, 8, 9), (64, 8, 10), (32, 4, 9), (64, 16, 4)],
)
def test_a_model_is_never_slower_than_in_the_references_plan(num_experts, num_shards, places, exponent, num_nodes):
    """The reference may split load unevenly, by two copies on one device. That puts it ahead in single layers, and
    where both come within 0.1 % of perfect balance."""
    load = zipf_load(12, num_experts, exponent)
    reference = sum(
        layer_cost(row, rebalance_layer(row, places * num_shards, 8, num_nodes, num_shards)) for row in load
    )
    new = rebalance(
        plan_evenly(range(12), num_experts, num_shards), load, shards=[places * 12] * num_shards, min_gain=0
    )
    mean = load.sum() / num_shards
    assert cost(new, load) <= max(reference * TOLERANCE, mean * 1.001)


def test_a_constant_rate_is_measured_from_the_second_count_on():
    meter = LoadMeter(1, 2, half_life_s=10)
    assert meter.rates(now=0.0).tolist() == [[0, 0]]
    for second in range(5):
        meter.observe("shard 0", [[1000 + 30 * second, 7]], now=100.0 + second)
    assert meter.rates(now=104.0) == pytest.approx(np.array([[30.0, 0.0]]))


def test_load_of_half_a_life_ago_counts_half():
    """10 s at 90 tokens/s, then 10 s without: of the weights 1/2 and 1, that is 90 / 3."""
    meter = LoadMeter(1, 1, half_life_s=10)
    for now, count in [(0, 0), (10, 900), (20, 900)]:
        meter.observe(0, [[count]], now=now)
    assert meter.rates(now=20) == pytest.approx(30.0)


def test_silence_lowers_the_rate():
    meter = LoadMeter(1, 1, half_life_s=10)
    meter.observe(0, [[0]], now=0)
    meter.observe(0, [[900]], now=10)
    assert meter.rates(now=20) == pytest.approx(30.0)


def test_a_restarted_shard_counts_from_zero():
    """60 tokens in the first 10 s. Then the shard restarts: its 50 and 10 are new, though one counter is above 40."""
    meter = LoadMeter(1, 2, half_life_s=1e9)
    meter.observe(0, [[0, 0]], now=0)
    meter.observe(0, [[40, 20]], now=10)
    meter.observe(0, [[50, 10]], now=20)
    assert meter.rates(now=20) == pytest.approx(np.array([[4.5, 1.5]]), rel=1e-6)


def test_the_loads_of_all_shards_add_up():
    meter = LoadMeter(1, 1, half_life_s=5)
    for now in range(0, 40, 2):
        meter.observe(0, [[20 * now]], now=now)
        meter.observe(1, [[9 * now]], now=now)
    assert meter.rates(now=38) == pytest.approx(29.0)


def test_counters_read_twice_at_one_time_lose_nothing():
    meter = LoadMeter(1, 1, half_life_s=5)
    for now, count in [(0, 0), (0, 10), (2, 20)]:
        meter.observe(0, [[count]], now=now)
    assert meter.rates(now=2) == pytest.approx(10.0)


def test_a_meter_keeps_no_reference_to_the_counters():
    counters = np.zeros((1, 1))
    meter = LoadMeter(1, 1, half_life_s=5)
    meter.observe(0, counters, now=0)
    counters += 10
    meter.observe(0, counters, now=1)
    assert meter.rates(now=1) == pytest.approx(10.0)
