"""Rows out to shards and back, over a transport that fails on command. Expert e multiplies a row by e + 1."""

import itertools
from dataclasses import replace

import pytest
import torch

from cluster.errors import SetupError, ShardUnavailable
from cluster.experts.deadline import Deadline
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.metrics import DispatchMetrics, new_registry


class Flight:
    def __init__(self, value):
        self.value = value

    def result(self, timeout_s):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def works(self):
        return False

    def abandon(self):
        pass


class LateFlight(Flight):
    """Has its answer at a time of the clock; a wait for it lets the time pass. works_until: until then its shard shows
    that it works."""

    def __init__(self, value, ready_at, clock, works_until=0.0):
        super().__init__(value)
        self.ready_at, self.clock, self.works_until, self.abandoned = ready_at, clock, works_until, False

    def works(self):
        return self.clock.now < self.works_until

    def result(self, timeout_s):
        if self.clock.now + timeout_s < self.ready_at:
            self.clock.now += max(timeout_s, 0.001)
            raise TimeoutError
        self.clock.now = max(self.clock.now, self.ready_at)
        return super().result(timeout_s)

    def abandon(self):
        self.abandoned = True


class FaultyTransport:
    """Computes sum of weight × (expert + 1) × row for the slots that the batch asks for. `dead` shards fail."""

    def __init__(self, at_submit=False):
        self.dead = set()
        self.at_submit = at_submit
        self.sent = []

    def submit(self, shard_id, batch):
        self.sent.append((shard_id, batch))
        if shard_id in self.dead:
            error = ShardUnavailable(f"shard {shard_id} died", shard_id)
            if self.at_submit:
                raise error
            return Flight(error)
        factors = torch.where(batch.topk_ids >= 0, batch.topk_weights * (batch.topk_ids + 1), 0.0).sum(dim=1)
        return Flight(batch.hidden_states * factors[:, None].to(batch.hidden_states.device))

    def close(self):
        pass


class ScriptedPlans:
    """Plays plans one after another: each wait moves to the next; `on_wait` may change the world meanwhile."""

    def __init__(self, *plans, clock=None, on_wait=lambda: None):
        self.plans, self.clock, self.on_wait = list(plans), clock, on_wait

    def current(self):
        return self.plans[0]

    def wait_beyond(self, epoch, timeout_s):
        self.on_wait()
        if self.clock is not None:
            self.clock.now += timeout_s
        if len(self.plans) > 1:
            self.plans.pop(0)
        return self.plans[0].epoch > epoch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def dispatcher(transport, plans, **options):
    return ExpertDispatcher(transport, plans, DispatchMetrics(new_registry(), "test"), **options)


X = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
IDS = torch.tensor([[0, 3], [1, 0], [2, 3]])
WEIGHTS = torch.tensor([[0.5, 0.25], [1.0, 1.0], [2.0, 0.5]])
# by hand: row 0: 0.5 × 1 + 0.25 × 4 = 1.5; row 1: 1 × 2 + 1 × 1 = 3; row 2: 2 × 3 + 0.5 × 4 = 8
EXPECTED = X * torch.tensor([[1.5], [3.0], [8.0]])


def run(made):
    return made.combine(made.dispatch(0, X, IDS, WEIGHTS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_rows_on_a_gpu_come_back_from_every_shard_and_find_another_copy(num_shards):
    """Shard 0 of the four fails: its rows are on a GPU, the ids that choose them on the host."""
    slices = tuple({0: (0, 1, 2, 3)} if num_shards == 1 else {0: (s % 4, (s + 1) % 4, (s + 2) % 4)} for s in range(4))
    plan = PlacementPlan(epoch=1, num_experts=4, slices=slices[:num_shards])
    transport = FaultyTransport()
    transport.dead = {0} if num_shards == 4 else set()
    made = dispatcher(transport, FixedPlan(plan))
    for _ in range(2):
        out = made.combine(made.dispatch(0, X.cuda(), IDS.cuda(), WEIGHTS.cuda()))
        torch.testing.assert_close(out.cpu(), EXPECTED)
    transport.dead = {0, 1, 2, 3}
    lost = Lost()
    made.combine(made.dispatch(0, X.cuda(), IDS.cuda(), WEIGHTS.cuda()), lost)
    assert {row for rows, _ in lost.rows for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_any_number_of_shards_gives_the_same_sums(num_shards):
    transport = FaultyTransport()
    torch.testing.assert_close(run(dispatcher(transport, FixedPlan(plan_evenly([0], 4, num_shards)))), EXPECTED)
    assert len(transport.sent) == num_shards


def test_a_shard_gets_only_the_rows_that_it_has_an_expert_for():
    """Experts 0 and 1 on shard 0, 2 and 3 on shard 1: row 1 goes to shard 0 only, row 2 to shard 1 only."""
    transport = FaultyTransport()
    run(dispatcher(transport, FixedPlan(plan_evenly([0], 4, 2))))
    rows = {shard_id: batch.hidden_states[:, 0].tolist() for shard_id, batch in transport.sent}
    assert rows == {0: [1.0, 2.0], 1: [1.0, 3.0]}
    assert transport.sent[0][1].topk_ids.tolist() == [[0, -1], [1, 0]]


def test_a_shard_without_rows_is_not_asked():
    transport = FaultyTransport()
    made = dispatcher(transport, FixedPlan(plan_evenly([0], 4, 4)))
    made.combine(made.dispatch(0, X[:1], IDS[:1], WEIGHTS[:1]))
    assert [shard_id for shard_id, _ in transport.sent] == [0, 3]


@pytest.mark.parametrize("at_submit", [False, True])
def test_rows_of_a_dead_shard_wait_for_its_successor(at_submit):
    transport = FaultyTransport(at_submit)
    transport.dead.add(1)
    plan = plan_evenly([0], 4, 2)
    later = PlacementPlan(epoch=2, num_experts=4, slices=plan.slices)
    plans = ScriptedPlans(plan, later, on_wait=transport.dead.clear)
    torch.testing.assert_close(run(dispatcher(transport, plans)), EXPECTED)
    assert [(shard_id, batch.epoch) for shard_id, batch in transport.sent] == [(0, 1), (1, 1), (1, 2)]


def test_rows_of_a_dead_shard_go_where_the_new_plan_has_their_experts():
    """Shard 1 dies for good; the next plan has its experts on shards 0 and 2."""
    transport = FaultyTransport()
    transport.dead.add(1)
    plan = PlacementPlan(epoch=1, num_experts=4, slices=({0: (0, 1)}, {0: (2, 3)}, {}))
    later = PlacementPlan(epoch=2, num_experts=4, slices=({0: (0, 1, 2)}, {}, {0: (3,)}))
    torch.testing.assert_close(run(dispatcher(transport, ScriptedPlans(plan, later))), EXPECTED)


def test_rows_without_a_living_copy_fail_after_the_recovery_time():
    transport, clock = FaultyTransport(), Clock()
    transport.dead.add(1)
    plans = ScriptedPlans(plan_evenly([0], 4, 2), clock=clock)
    made = dispatcher(transport, plans, recovery_timeout_s=7.0, clock=clock)
    with pytest.raises(ShardUnavailable, match=r"shard 1 did not answer for layer 0 in 7 s") as raised:
        run(made)
    assert raised.value.shard_id == 1
    assert clock.now == pytest.approx(7.0)


def test_sums_are_made_in_shard_order_in_float32():
    """In bfloat16, 256 + 1 + 1 loses both ones if each sum is rounded, in float32 none: 258."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[256.0, 0.5, 1 / 3]])
    made = dispatcher(FaultyTransport(), FixedPlan(plan_evenly([0], 3, 3)))
    assert made.combine(made.dispatch(0, x, torch.tensor([[0, 1, 2]]), weights)).tolist() == [[258.0]]


@pytest.mark.parametrize(
    ("num_experts", "num_shards", "sizes"),
    [(60, 7, [9, 9, 9, 9, 8, 8, 8]), (64, 3, [22, 21, 21]), (4, 4, [1, 1, 1, 1])],
)
def test_uneven_slices_hold_every_expert_once(num_experts, num_shards, sizes):
    plan = plan_evenly([0, 2], num_experts, num_shards)
    assert [len(s[2]) for s in plan.slices] == sizes
    assert sorted(expert for s in plan.slices for expert in s[0]) == list(range(num_experts))
    assert plan.layer_ids == (0, 2)


@pytest.mark.parametrize("num_shards", [0, 65])
def test_more_shards_than_experts_is_refused(num_shards):
    with pytest.raises(SetupError, match="1 to 64 shards"):
        plan_evenly([0], 64, num_shards)


def test_a_plan_that_lacks_an_expert_is_refused():
    with pytest.raises(ValueError, match=r"layer 0: experts \[1\]"):
        PlacementPlan(epoch=1, num_experts=2, slices=({0: (0,)},))


TWO_COPIES = PlacementPlan(
    epoch=1, num_experts=4, slices=({0: (0, 1)}, {0: (2, 3)}, {0: (0, 1, 2, 3)})
)  # every expert is on shard 2, and on one other


class SlowTransport(FaultyTransport):
    """`delays`: seconds that a shard takes.  works_until: it shows that it works, until that time of the clock."""

    works_until = 0.0

    def __init__(self, clock, **delays):
        super().__init__()
        self.clock, self.delays, self.flights = clock, {int(k[1:]): v for k, v in delays.items()}, []

    def submit(self, shard_id, batch):
        flight = super().submit(shard_id, batch)
        ready_at = self.clock.now + self.delays.get(shard_id, 0.001)
        late = LateFlight(flight.value, ready_at, self.clock, self.works_until)
        self.flights.append((shard_id, late))
        return late


def shards_of(transport):
    return [shard_id for shard_id, _ in transport.sent]


def warm(made, transport):
    """Enough answers to know how long one takes."""
    for _ in range(3):
        run(made)
    transport.sent.clear()
    transport.flights.clear()


def test_the_rows_of_an_expert_are_split_between_its_copies():
    transport = FaultyTransport()
    plan = PlacementPlan(epoch=1, num_experts=4, slices=({0: (0, 1, 2)}, {0: (0, 3)}, {0: (0,)}))
    made = dispatcher(transport, FixedPlan(plan))
    ids, weights = torch.zeros((30, 1), dtype=torch.int64), torch.ones((30, 1))
    x = torch.arange(30.0).unsqueeze(1)
    assert torch.equal(made.combine(made.dispatch(0, x, ids, weights)), x)
    assert [batch.hidden_states.shape[0] for _, batch in transport.sent] == [10, 10, 10]


def test_a_shard_that_is_down_gets_nothing_that_another_holds():
    transport = FaultyTransport()
    plan = replace(TWO_COPIES, down=frozenset({2}))
    assert torch.equal(run(dispatcher(transport, FixedPlan(plan))), EXPECTED)
    assert shards_of(transport) == [0, 1]


@pytest.mark.parametrize("at_submit", [False, True])
def test_rows_of_a_dead_shard_go_to_the_other_copies_without_waiting_for_news(at_submit):
    transport = FaultyTransport(at_submit)
    transport.dead = {2}
    plans = ScriptedPlans(TWO_COPIES, on_wait=lambda: pytest.fail("waited"))
    made = dispatcher(transport, plans)
    assert torch.equal(run(made), EXPECTED)
    transport.sent.clear()
    assert torch.equal(run(made), EXPECTED)
    assert 2 not in shards_of(transport)  # it is not tried again at once


def test_a_suspect_is_tried_again_after_a_while_and_less_and_less_often():
    clock, transport = Clock(), FaultyTransport()
    transport.dead = {2}
    made = dispatcher(transport, FixedPlan(TWO_COPIES), clock=clock)
    tried_at = []
    for _ in range(100):
        transport.sent.clear()
        assert torch.equal(run(made), EXPECTED)
        if 2 in shards_of(transport):
            tried_at.append(clock.now)
        clock.now += 0.1
    assert [round(b - a) for a, b in itertools.pairwise(tried_at)] == [1, 2, 4]
    transport.dead = set()
    clock.now += 20
    run(made)
    transport.sent.clear()
    run(made)
    assert 2 in shards_of(transport)


def test_a_late_shard_is_overtaken_by_its_copies():
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, FixedPlan(TWO_COPIES), clock=clock)
    warm(made, transport)
    transport.delays[2] = 1000.0
    started = clock.now
    assert torch.equal(run(made), EXPECTED)
    assert clock.now - started < 0.2
    assert [flight.abandoned for shard_id, flight in transport.flights if shard_id == 2] == [True]
    transport.sent.clear()
    assert torch.equal(run(made), EXPECTED)
    assert 2 not in shards_of(transport)


def test_a_late_shard_is_overtaken_even_by_a_copy_that_was_late_itself_a_moment_ago():
    """On a busy machine each shard is late at times: one that really hangs must not find the others barred."""
    clock = Clock()
    transport = SlowTransport(clock)
    plan = PlacementPlan(epoch=1, num_experts=4, slices=({0: (0, 1)}, {0: (2, 3)}, {0: (0, 1)}, {0: (2, 3)}))
    made = dispatcher(transport, FixedPlan(plan), clock=clock)
    warm(made, transport)
    for shard_id in (0, 1):
        made.routing.failed(shard_id, heard_at=clock.now, silent=False)
    transport.delays = {2: 1000.0, 3: 1000.0}
    started = clock.now
    assert torch.equal(run(made), EXPECTED)
    assert clock.now - started < 0.5


def test_a_late_shard_that_answers_before_its_copies_wins():
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, FixedPlan(TWO_COPIES), clock=clock)
    warm(made, transport)
    transport.delays = {0: 1000.0, 1: 1000.0, 2: 0.15}
    transport.dead = set()
    alone = torch.tensor([[2, 2], [2, 2], [2, 2]])
    flight = made.dispatch(0, X, alone, WEIGHTS)
    if 2 not in shards_of(transport):  # rows are split: the first leg may be the other copy's
        pytest.fail("no rows for shard 2")
    late = [leg for leg in flight.legs if leg.shard_id == 2]
    value = made.receiver.receive(late[0], Deadline(clock, clock.now + 100))
    asked = late[0].batch.topk_ids == 2
    expected = late[0].batch.hidden_states * 3 * (late[0].batch.topk_weights * asked).sum(1, keepdim=True)
    assert torch.equal(value, expected)
    assert all(flight.abandoned for shard_id, flight in transport.flights[len(flight.legs) :] if shard_id != 2)


def test_second_sendings_are_a_small_share_of_all():
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, FixedPlan(TWO_COPIES), clock=clock)
    warm(made, transport)
    made.calls.patience.late_s = lambda num_rows: 0.0  # every answer counts as late
    made.routing.suspected = lambda: frozenset()
    for _ in range(200):
        assert torch.equal(run(made), EXPECTED)
    first_sendings = 200 * len(made.dispatch(0, X, IDS, WEIGHTS).legs)
    assert len(transport.sent) <= first_sendings + 2 * (10 + 0.06 * first_sendings)


def test_without_another_copy_a_late_shard_is_waited_for():
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, FixedPlan(plan_evenly([0], 4, 2)), clock=clock)
    warm(made, transport)
    transport.delays[1] = 5.0
    assert torch.equal(run(made), EXPECTED)
    assert shards_of(transport) == [0, 1]


def test_rows_at_a_shard_of_an_older_plan_are_sent_again():
    """A node that is cut off says nothing; its successor stands in the next plan."""
    clock = Clock()
    transport = SlowTransport(clock)
    plan = plan_evenly([0], 4, 2)
    plans = ScriptedPlans(plan)
    made = dispatcher(transport, plans, clock=clock)
    warm(made, transport)
    transport.delays[1] = 1000.0
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    plans.plans = [replace(plan, epoch=2)]
    transport.delays[1] = 0.001
    assert torch.equal(made.combine(flight), EXPECTED)
    assert clock.now < 3.0


def test_a_plan_that_changes_between_two_looks_costs_no_row():
    """Each look finds another plan, of two shards or of four: rows go by one of them, all experts included."""

    class Restless:
        def __init__(self):
            self.plans = (replace(plan_evenly([0], 4, 2 + 2 * (i % 2)), epoch=i) for i in itertools.count(1))

        def current(self):
            return next(self.plans)

    for _ in range(3):
        assert torch.equal(run(dispatcher(FaultyTransport(), Restless())), EXPECTED)


class Lost:
    """A step's losses: (row numbers, shard) of each, in their order."""

    def __init__(self):
        self.hung, self.rows = set(), []

    def lose(self, rows, error):
        self.rows.append((rows.tolist(), error.shard_id))


@pytest.mark.parametrize("at_submit", [False, True])
def test_rows_without_a_living_copy_are_lost_and_the_others_come(at_submit):
    """Rows 0 and 2 need shard 1. The first time they wait half a second for its successor, then not at all."""
    transport, clock = FaultyTransport(at_submit), Clock()
    transport.dead.add(1)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 2), clock=clock), clock=clock)
    for waited in (0.5, 0.0):
        began, lost = clock.now, Lost()
        out = made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost)
        assert torch.equal(out[1], EXPECTED[1])
        assert lost.rows == [([0, 2], 1)]
        assert clock.now - began == pytest.approx(waited)
    transport.dead.clear()
    lost = Lost()
    assert torch.equal(made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost), EXPECTED)
    assert lost.rows == []


@pytest.mark.parametrize("at_submit", [False, True])
def test_when_all_rows_of_the_only_shard_are_lost_no_empty_batch_is_sent(at_submit):
    transport, clock = FaultyTransport(at_submit), Clock()
    transport.dead.add(0)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 1), clock=clock), clock=clock)
    for _ in range(2):
        lost = Lost()
        made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost)
        assert lost.rows == [([0, 1, 2], 0)]
    assert all(batch.hidden_states.shape[0] for _, batch in transport.sent)


def test_a_successor_that_comes_soon_loses_no_row():
    transport, clock = FaultyTransport(), Clock()
    transport.dead.add(1)
    plan = plan_evenly([0], 4, 2)
    plans = ScriptedPlans(plan, replace(plan, epoch=2), clock=clock, on_wait=transport.dead.clear)
    made, lost = dispatcher(transport, plans, clock=clock), Lost()
    assert torch.equal(made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost), EXPECTED)
    assert lost.rows == []


def test_rows_whose_copies_are_all_dead_are_lost_without_asking_them_in_a_circle():
    transport, clock = FaultyTransport(at_submit=True), Clock()
    transport.dead = {1, 2}
    made = dispatcher(transport, ScriptedPlans(TWO_COPIES, clock=clock), clock=clock)
    lost = Lost()
    out = made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost)
    assert torch.equal(out[1], EXPECTED[1])
    assert {row for rows, _ in lost.rows for row in rows} == {0, 2}
    assert clock.now <= 1.5
    assert len(transport.sent) < 20


def with_a_silent_shard(plan):
    """A warm dispatcher, its transport, its plans and its clock. Shard 1 does not answer from now on."""
    clock = Clock()
    transport, plans = SlowTransport(clock), ScriptedPlans(plan)
    made = dispatcher(transport, plans, clock=clock)
    warm(made, transport)
    transport.delays[1] = 1000.0
    return made, transport, plans, clock


def test_a_newer_plan_sends_rows_again_and_loses_none():
    """The plan changed while the old call was out, for longer than a loss takes."""
    plan, lost = plan_evenly([0], 4, 2), Lost()
    made, transport, plans, clock = with_a_silent_shard(plan)
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    clock.now += 3.0
    plans.plans = [replace(plan, epoch=2)]
    transport.delays[1] = 0.001
    assert torch.equal(made.combine(flight, lost), EXPECTED)
    assert lost.rows == []


def test_a_slow_answer_is_no_lost_one():
    """Rows that always take 8 s come, however often others were quick."""
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 2), clock=clock), clock=clock)
    for _ in range(3):
        warm(made, transport)
        transport.delays[1] = 8.0
        lost = Lost()
        assert torch.equal(made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost), EXPECTED)
        assert lost.rows == []
        transport.delays[1] = 0.001


def test_a_silent_shard_is_waited_for_once_in_a_step_then_shorter_and_longer_again():
    """First for shard_timeout_s, in the next steps 5, 10, 20 s: it may only need long, here 12 s."""
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 2), clock=clock), clock=clock)
    warm(made, transport)
    transport.delays[1] = 1000.0
    for waited in (30.0, 5.0, 10.0):
        lost, began = Lost(), clock.now
        for _ in range(3):  # layers
            out = made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost)
            assert torch.equal(out[1], EXPECTED[1])
        assert lost.rows == [([0, 2], 1)] * 3
        assert clock.now - began == pytest.approx(waited, abs=0.7)
    transport.delays[1] = 12.0
    lost = Lost()
    assert torch.equal(made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost), EXPECTED)
    assert lost.rows == []


@pytest.mark.parametrize("hung", [0, 1])
def test_an_answer_that_came_while_another_shard_was_waited_for_counts(hung):
    """Row 0 needs shard 0 only, row 1 shard 1 only: one of them hangs, the other one's row comes."""
    clock = Clock()
    transport = SlowTransport(clock)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 2), clock=clock), clock=clock)
    warm(made, transport)
    transport.delays[hung] = 1000.0
    for _ in range(3):
        lost = Lost()
        out = made.combine(made.dispatch(0, X[:2], torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)), lost)
        assert lost.rows == [([hung], hung)]
        assert {shard_id for _, shard_id in lost.hung} == {hung}
        assert torch.equal(out[1 - hung], (X[:2] * torch.tensor([[3.0], [7.0]]))[1 - hung])


def test_a_silent_shard_is_waited_for_once_by_each_plan():
    plan, lost = plan_evenly([0], 4, 2), Lost()
    made, _, plans, clock = with_a_silent_shard(plan)
    waited = []
    for layer in range(5):
        if layer == 2:
            plans.plans = [replace(plan, epoch=2)]
        began = clock.now
        made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost)
        waited.append(round(clock.now - began))
    assert waited == [30, 0, 30, 0, 0]


def test_an_only_shard_that_died_is_not_asked_for_rows_that_ask_for_no_expert():
    """An only shard gets the rows of lost sequences too, without experts."""
    transport, clock = FaultyTransport(), Clock()
    transport.dead.add(0)
    made = dispatcher(transport, ScriptedPlans(plan_evenly([0], 4, 1), clock=clock), clock=clock)
    lost = Lost()
    made.combine(made.dispatch(0, X, torch.full_like(IDS, -1), WEIGHTS), lost)
    assert len(transport.sent) < 5
