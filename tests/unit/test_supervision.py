"""Shards are kept alive: back-off, shards that hang, starts that are given up. On processes that are none."""

import asyncio
import itertools
from dataclasses import replace

import pytest
import ray
import virtual_time
from control_fakes import CONFIG, LOAD_S, FakeCluster, task_error

from cluster.errors import SetupError
from cluster.runtime.control.recall import Left
from cluster.runtime.control.shard_process import FIND_S
from cluster.runtime.control.supervision import MAX_FIRST_STARTS

NO_MEMORY = RuntimeError("can't allocate memory: you tried to allocate 35184372072448 bytes.\nError code 12")
ONE = replace(CONFIG, expert_shards=1)


async def failure_of(made):
    await made.state.news.wait_for(lambda: made.state.failure is not None)
    return str(made.state.failure)


def test_the_plan_is_published_when_all_shards_have_loaded():
    async def play():
        made = FakeCluster()
        made.begin()
        await asyncio.sleep(LOAD_S / 2)
        assert not made.state.published
        await asyncio.sleep(LOAD_S)
        assert (made.state.published, made.state.plan.epoch, made.state.plan.down) == (True, 1, frozenset())
        assert made.actor(1).experts == {0: (2, 3), 1: (2, 3)}, "its half of four experts, of both layers"

    virtual_time.run(play)


def test_a_killed_shard_is_down_in_the_plan_and_followed_at_once():
    async def play():
        made = await FakeCluster().up()
        died_at = virtual_time.now()
        made.actor(0).die()
        await asyncio.sleep(0.01)
        assert made.state.plan.down == {0}
        assert made.launcher.starts[-1] == (died_at, "g:shard-0")
        await asyncio.sleep(LOAD_S)
        assert (made.state.plan.down, made.state.plan.epoch) == (frozenset(), 3)
        assert made.shards[0].status.respawns == 1
        assert [fault.what for fault in made.state.faults] == ["shard 0 died"]
        assert (made.value("respawns_total", shard_id="0"), made.value("respawns_total", shard_id="1")) == (1, 0)

    virtual_time.run(play)


def test_a_shard_that_dies_at_each_load_starts_after_0_1_2_4_8_8_seconds():
    """A load takes a second."""

    async def play():
        made = await FakeCluster(ONE).up()
        await asyncio.sleep(60)
        made.launcher.starts.clear()
        made.launcher.errors.extend(ray.exceptions.RayActorError() for _ in range(6))
        made.actor(0).die()
        await asyncio.sleep(60)
        times = [time for time, _ in made.launcher.starts]
        waits = [after - before - LOAD_S for before, after in itertools.pairwise(times)]
        assert waits == pytest.approx([1, 2, 4, 8, 8, 8])  # the first successor came at once
        assert made.state.plan.down == frozenset()

    virtual_time.run(play)


def test_a_shard_that_was_up_for_a_while_starts_again_at_the_first_back_off():
    async def play():
        made = await FakeCluster(ONE).up()
        for _ in range(3):
            await asyncio.sleep(10)
            died_at = virtual_time.now()
            made.actor(0).die()
            await asyncio.sleep(5)
            assert made.launcher.starts[-1] == (died_at, "g:shard-0")

    virtual_time.run(play)


def test_a_shard_that_answers_nothing_is_killed_after_its_time_and_followed():
    """A question every 2 s, 10 s for an answer."""

    async def play():
        made = await FakeCluster(ONE).up()
        stopped, stopped_at = made.actor(0), virtual_time.now()
        stopped.stopped = True
        await asyncio.sleep(11.9)
        assert (made.launcher.killed, made.state.plan.down) == ([], frozenset())
        await asyncio.sleep(0.2)
        assert made.launcher.killed == [stopped.pid]
        assert made.state.plan.down == {0}
        assert made.launcher.starts[-1][0] == pytest.approx(stopped_at + 12)
        assert made.state.faults[-1].what == "shard 0 did not answer for 10 s and was killed"

    virtual_time.run(play)


def test_a_shard_whose_work_stands_still_is_killed_and_one_that_computes_for_long_is_not():
    async def play():
        made = await FakeCluster(ONE).up()
        made.actor(0).stuck_s = 9.9
        await asyncio.sleep(100)
        assert made.launcher.killed == []
        made.actor(0).stuck_s = 10.0
        await asyncio.sleep(2.1)
        assert len(made.launcher.killed) == 1
        assert made.state.faults[-1].what == "shard 0 did not get on with its work for 10 s and was killed"

    virtual_time.run(play)


def test_a_shard_without_memory_is_given_up_with_its_own_words():
    async def play():
        made = FakeCluster(ONE)
        made.launcher.errors.extend([task_error(NO_MEMORY)] * MAX_FIRST_STARTS)
        made.begin()
        failure = await failure_of(made)
        assert failure.startswith("shard 0 did not load in 5 attempts, the last one failed: ")
        assert "allocate 35184372072448" in failure
        assert failure.isprintable()
        assert len(made.state.faults) == MAX_FIRST_STARTS - 1

    virtual_time.run(play)


def test_a_shard_that_is_killed_at_each_start_is_given_up():
    async def play():
        made = FakeCluster(ONE)
        made.launcher.errors.extend(ray.exceptions.RayActorError() for _ in range(MAX_FIRST_STARTS))
        made.begin()
        assert "did not load in 5 attempts, the last one died" in await failure_of(made)

    virtual_time.run(play)


def test_a_cluster_that_served_goes_on_trying():
    async def play():
        made = await FakeCluster(ONE).up()
        made.launcher.errors.extend([task_error(NO_MEMORY)] * 20)
        made.actor(0).die()
        await asyncio.sleep(20 * (8 + LOAD_S) + LOAD_S)
        assert made.shards.all_up()
        assert made.state.failure is None

    virtual_time.run(play)


@pytest.mark.parametrize("served", [False, True])
def test_what_will_not_pass_is_not_tried_again(served):
    async def play():
        made = FakeCluster(ONE)
        if served:
            await made.up()
            made.launcher.starts.clear()
        made.launcher.errors.append(task_error(SetupError("layer 3 is not in the checkpoint")))
        if served:
            made.actor(0).die()
        else:
            made.begin()
        assert await failure_of(made) == "layer 3 is not in the checkpoint"
        await asyncio.sleep(60)
        assert len(made.launcher.starts) == 1

    virtual_time.run(play)


def test_a_shard_goes_to_the_node_with_the_fewest_that_is_large_enough():
    """Nodes of 8 CPUs: a and b in turn; with shards of 9 nowhere in particular."""

    async def play():
        made = await FakeCluster(replace(CONFIG, expert_shards=4)).up()
        assert [shard.node_id for shard in made.shards] == ["a", "b", "a", "b"]
        assert await made.supervision.emptiest_node() == "a"
        large = FakeCluster(replace(CONFIG, cpus_per_expert_shard=9.0))
        assert await large.supervision.emptiest_node() is None

    virtual_time.run(play)


def test_an_actor_that_an_earlier_controller_left_is_taken_up_and_reads_nothing():
    async def play():
        before = await FakeCluster().up()
        made = FakeCluster(launcher=before.launcher)
        for task in before.supervision._tasks:
            task.cancel()
        before.launcher.actors["g:spare-x"] = before.launcher.actors.pop("g:shard-0")  # it was a spare process
        made.supervision.take_over({0: Left("g:spare-x", "g:shard-0")})
        made.begin()
        await asyncio.sleep(LOAD_S)
        assert made.shards.all_up()
        assert made.shards[0].status.actor == "g:spare-x"
        assert [event for event in before.launcher.log if event[0] == "load"] == []
        assert len(before.launcher.starts) == 2, "no process more"

    virtual_time.run(play)


def test_a_shard_that_dies_while_the_gcs_is_away_is_followed_by_its_nodes_spare_process():
    """For longer than the minute after which Ray gives up: what needs the GCS waits for it, and nothing fails."""

    async def play():
        made = await FakeCluster(replace(CONFIG, spare_processes=True)).up()
        await made.spares.keep(["a", "b"])
        await made.spares.started("a")
        lost = made.actor(0)
        made.launcher.gcs_away = True
        lost.die()
        await asyncio.sleep(0.01)
        assert made.state.plan.down == {0}
        await asyncio.sleep(FIND_S + LOAD_S)
        assert made.state.plan.down == frozenset()
        assert made.actor(0).name.startswith("g:spare-")
        assert made.actor(0).node_id == lost.node_id
        assert ("end", lost.name) in made.launcher.log, "if it lives after all"

        made.actor(0).die()
        starts = len(made.launcher.starts)
        await asyncio.sleep(120)
        assert (made.state.plan.down, made.state.failure, len(made.launcher.starts)) == ({0}, None, starts)
        made.launcher.gcs_away = False
        await made.state.until(made.shards.all_up)
        assert [name for _, name in made.launcher.starts[starts:]] == ["g:shard-0"]

    virtual_time.run(play)
