"""A dispatcher waits for a shard that works, however long, and not for a silent one. Over a clock of the test."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_dispatch import (
    EXPECTED,
    IDS,
    TWO_COPIES,
    WEIGHTS,
    Clock,
    Lost,
    ScriptedPlans,
    SlowTransport,
    X,
    dispatcher,
    run,
    shards_of,
    warm,
)

from cluster.experts.placement import plan_evenly
from cluster.experts.pulse import Sign
from cluster.runtime.workers.transports import RayFlight

PLAN = plan_evenly([0], 4, 2)


def slow(plan=PLAN, *, works_until=math.inf, **options):
    """A dispatcher that knows quick answers (1 ms), over a transport, plans and a clock."""
    clock = Clock()
    transport, plans = SlowTransport(clock), ScriptedPlans(plan, clock=clock)
    made = dispatcher(transport, plans, clock=clock, **options)
    warm(made, transport)
    transport.works_until = works_until
    return made, transport, plans, clock


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("slow_shards", [(0,), (1,), (0, 1)])
def test_a_shard_that_works_100_times_longer_than_a_timeout_answers_and_is_asked_once(slow_shards, losses):
    """30 s are a timeout, 60 s the recovery's: 3,000 s are beyond both."""
    made, transport, _, clock = slow()
    transport.delays = dict.fromkeys(slow_shards, 3000.0)
    lost = Lost() if losses else None
    assert torch.equal(made.combine(made.dispatch(0, X, IDS, WEIGHTS), lost), EXPECTED)
    assert shards_of(transport) == [0, 1]
    assert clock.now > 3000.0
    assert lost is None or (lost.rows, lost.hung) == ([], set())


def test_layer_after_layer_a_slow_shard_is_never_suspected():
    made, transport, _, _ = slow()
    transport.delays = {1: 100.0}
    for _ in range(5):
        assert torch.equal(run(made), EXPECTED)
    assert shards_of(transport) == [0, 1] * 5


@pytest.mark.parametrize("works_for_s", [0.0, 200.0])
def test_a_shard_that_falls_silent_is_given_up_after_the_timeout_and_its_successor_gets_the_rows(works_for_s):
    made, transport, plans, clock = slow(works_until=works_for_s)
    transport.delays = {1: 10_000.0}

    def succeed():
        transport.delays = {}

    plans.on_wait = succeed
    assert torch.equal(run(made), EXPECTED)
    assert clock.now == pytest.approx(works_for_s + 30.0, abs=1.5)
    assert shards_of(transport) == [0, 1, 1]


def test_a_silent_shard_beside_a_slow_one_is_looked_for_from_the_last_sign_of_work():
    """Shard 0 works for 500 s. Rows of shard 1, silent all along, still find a successor that comes after 40 s."""
    made, transport, plans, clock = slow()
    transport.delays = {0: 500.0, 1: 10_000.0}
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    transport.flights[1][1].works_until = 0.0
    transport.at_submit, transport.dead, transport.delays = True, {1}, {}

    def succeed():
        if clock.now >= 540.0:
            transport.dead.clear()

    plans.on_wait = succeed
    assert torch.equal(made.combine(flight), EXPECTED)
    assert clock.now < 550.0


def test_a_newer_plan_sends_nothing_again_to_a_shard_that_works():
    made, transport, plans, _ = slow()
    transport.delays = {1: 100.0}
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    plans.plans = [replace(PLAN, epoch=2)]
    assert torch.equal(made.combine(flight), EXPECTED)
    assert shards_of(transport) == [0, 1]


def test_a_newer_plan_in_which_the_shard_is_down_sends_its_rows_again():
    """The controller has given the process up: its signs of work count no more."""
    plan = replace(TWO_COPIES, slices=({0: (0, 1)}, {0: (2, 3)}, {0: (2, 3)}))
    made, transport, plans, clock = slow(plan)
    transport.delays = {1: 10_000.0}
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    began, plans.plans = clock.now, [replace(plan, epoch=2, down=frozenset({1}))]
    assert torch.equal(made.combine(flight), EXPECTED)
    assert clock.now - began < 2.0


def test_a_slow_shard_without_another_copy_is_never_hedged():
    made, transport, _, _ = slow()
    transport.delays = {0: 20.0, 1: 20.0}
    for _ in range(20):
        assert torch.equal(run(made), EXPECTED)
    assert shards_of(transport) == [0, 1] * 20


def test_when_every_copy_is_slow_rows_are_asked_of_another_one_once():
    """The second sending is the hedge; neither is given up for the time that it takes."""
    made, transport, _, _ = slow(TWO_COPIES)
    transport.delays = {0: 400.0, 1: 400.0, 2: 400.0}
    flight = made.dispatch(0, X, IDS, WEIGHTS)
    first = len(transport.sent)
    assert torch.equal(made.combine(flight), EXPECTED)
    assert first < len(transport.sent) <= 2 * first


def test_a_shard_of_an_older_version_shows_nothing_over_ray_calls():
    """It has no `sign`: its callers wait as long as they did before there was one."""
    assert not RayFlight(0, SimpleNamespace(), None, torch.empty(0)).works()


def test_a_ray_call_is_worked_on_when_its_shard_gets_on(monkeypatch):
    """The first look finds it busy; from then on its progress counts. The same number twice is no sign, nor is an idle
    shard."""
    answers = [Sign(progress=7, busy=True), Sign(progress=7, busy=True), Sign(progress=9, busy=True)]
    monkeypatch.setattr("cluster.runtime.workers.transports.PROBE_S", 0.0)
    monkeypatch.setattr("cluster.runtime.workers.transports.ray.wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr("cluster.runtime.workers.transports.ray.get", lambda sign: sign)
    shard = SimpleNamespace(sign=SimpleNamespace(remote=lambda: answers.pop(0) if answers else Sign(progress=9)))
    flight = RayFlight(0, shard, None, torch.empty(0))
    assert [flight.works() for _ in range(6)] == [False, True, False, True, False, False]
    idle = RayFlight(0, shard, None, torch.empty(0))
    assert [idle.works() for _ in range(3)] == [False, False, False]
