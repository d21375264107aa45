"""The controller's knowledge of its cluster: coverage, epochs, the record for a successor."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import virtual_time
from control_fakes import CONFIG

from cluster.errors import SetupError
from cluster.experts.placement import PlacementPlan
from cluster.metrics import ControllerMetrics, new_registry
from cluster.runtime.control.news import News
from cluster.runtime.control.shards import Shards
from cluster.runtime.control.state import MAX_FAULTS, ClusterState, Coverage, coverage

# Experts 0 to 3 of two layers on three shards: of layer 0, expert 1 has two copies and expert 2 has three.
PLAN = PlacementPlan(
    epoch=0,
    num_experts=4,
    slices=({0: (0, 1, 2), 1: (0, 1)}, {0: (1, 2, 3), 1: (2, 3)}, {0: (2,)}),
)


@pytest.mark.parametrize(
    ("up", "expected"),
    [
        ({0, 1, 2}, Coverage(none=0, one=6, more=2)),
        ({0, 1}, Coverage(none=0, one=6, more=2)),
        ({1, 2}, Coverage(none=3, one=4, more=1)),  # 0 of layer 0; 0 and 1 of layer 1
        ({2}, Coverage(none=7, one=1, more=0)),
        (set(), Coverage(none=8, one=0, more=0)),
    ],
)
def test_coverage_counts_experts_by_their_copies_that_are_up(up, expected):
    assert coverage(PLAN, up) == expected


class Handle:
    """An actor that only remembers."""

    def __init__(self):
        self.records = []
        self.remember = SimpleNamespace(remote=self.records.append)


class State:
    def __init__(self, plan=PLAN):
        self.now, self.registry, self.shards = 100.0, new_registry(), Shards()
        for shard_id in range(plan.num_shards):
            self.shards.add(SimpleNamespace(shard_id=shard_id, handle=Handle()))
        self.state = ClusterState(
            "g", CONFIG, self.shards, ControllerMetrics(self.registry), news=News(),
            clock=lambda: self.now, wall_clock=lambda: self.now,
        )  # fmt: skip
        self.state.begin(plan)

    def lose(self, shard_id):
        self.shards[shard_id].handle = None
        self.state.publish()

    def regain(self, shard_id):
        self.shards[shard_id].handle = Handle()
        self.state.publish()


def test_each_plan_that_is_published_has_a_higher_epoch():
    made = State()
    assert not made.state.is_news(-1), "nothing is published"
    made.state.publish()
    assert made.state.plan.epoch == 1
    assert made.state.is_news(0)
    assert not made.state.is_news(1)
    made.state.publish(beyond=7)  # callers have a plan of an earlier controller
    assert made.state.plan.epoch == 8
    made.state.publish(PLAN)  # its own epoch is 0
    assert made.state.plan.epoch == 9


def test_a_lost_shard_is_down_in_the_plan_until_it_is_back():
    made = State()
    made.state.publish()
    assert made.state.plan.down == frozenset()
    made.lose(1)
    assert (made.state.plan.down, made.state.plan.slices) == ({1}, PLAN.slices)
    made.regain(1)
    assert made.state.plan.down == frozenset()
    assert made.state.plan.epoch == 3


def test_a_cluster_is_uncovered_from_the_first_loss_of_an_only_copy_until_the_last_is_back():
    made = State()
    made.state.publish()
    made.lose(2)
    made.now += 5
    assert made.state.uncovered_s == 0, "all that shard 2 has, others have too"
    made.lose(0)
    made.now += 3
    made.lose(1)
    made.now += 4
    assert made.state.uncovered_s == 7
    made.regain(0)
    assert made.state.uncovered_s == 7, "shard 1 is still away"
    made.regain(1)
    assert made.state.uncovered_s == 0


def test_the_gauges_show_the_coverage_and_the_shards():
    made = State()
    made.state.publish()
    made.lose(0)

    def value(name, **labels):
        return made.registry.get_sample_value(f"moecluster_controller_{name}", labels)

    assert [value("experts", copies=copies) for copies in ("0", "1", "2+")] == [3, 4, 1]
    assert (value("up_shards"), value("wanted_shards"), value("plan_epoch")) == (2, 3, 2), "the plan asks for three"


def test_shards_keep_what_a_successor_must_know():
    made = State()
    made.state.publish()
    made.lose(0)
    made.now += 1
    made.state.aim(5)
    record = made.shards[1].handle.records[-1]
    assert (record.version, record.target, record.plan.epoch, record.config) == (101.0, 5, 2, CONFIG)
    assert record.plan.down == frozenset(), "a successor looks itself"
    versions = [record.version for record in made.shards[1].handle.records]
    assert versions == sorted(versions)


def test_a_new_number_of_shards_in_the_configuration_is_the_target_and_another_field_leaves_it():
    made = State()
    made.state.aim(3)  # by `moe-cluster scale`
    made.state.follow(replace(CONFIG, shard_timeout_s=5.0))
    assert made.state.target == 3
    made.state.follow(replace(CONFIG, expert_shards=4))
    assert made.state.target == 4


def test_the_last_faults_stay():
    made = State()
    for i in range(MAX_FAULTS + 1):
        made.state.note(f"fault {i}")
    assert (made.state.faults[0].what, made.state.faults[-1].what) == ("fault 1", f"fault {MAX_FAULTS}")


def test_who_waits_for_a_plan_hears_that_there_will_be_none():
    async def play():
        made = State()
        waiting = asyncio.ensure_future(made.state.until(lambda: made.state.published))
        await asyncio.sleep(1)
        made.state.fail(SetupError("no such checkpoint"))
        with pytest.raises(SetupError, match="no such checkpoint"):
            await waiting

    virtual_time.run(play)


def test_all_who_wait_hear_of_news_and_each_looks_for_itself():
    async def play():
        news, value = News(), 0
        waiting = [asyncio.ensure_future(news.wait_for(lambda wanted=wanted: value >= wanted)) for wanted in (1, 2)]
        await asyncio.sleep(1)
        for wanted in (1, 2):
            assert [w.done() for w in waiting] == [wanted > 1, False]
            value = wanted
            news.tell()
            await asyncio.sleep(1)
        assert all(w.done() for w in waiting)

    virtual_time.run(play)
