"""Changes of placement are made before they are broken, one after another. On processes that are none.

Two layers of four experts on two shards: shard 0 has experts 0 and 1 of each layer, shard 1 has 2 and 3.
"""

import asyncio
from dataclasses import replace

import pytest
import virtual_time
from control_fakes import CONFIG, FACTS, LOAD_S, FakeCluster, task_error

from cluster.config.options import MOST_BYTES, MOST_CALLS
from cluster.errors import ClusterError, SetupError
from cluster.experts.placement import PlacementPlan
from cluster.runtime.control.capacity import capacities, first_plan, padded, union
from cluster.runtime.control.changes import ADOPTION_TIMEOUT_S, GROW_TIMEOUT_S, Change
from cluster.status import ProcessInfo

HALF, OTHER_HALF = {0: (0, 1), 1: (0, 1)}, {0: (2, 3), 1: (2, 3)}
# Expert 1 and expert 2 of layer 0 have changed places.
SWAPPED = PlacementPlan(epoch=0, num_experts=4, slices=({0: (0, 2), 1: (0, 1)}, {0: (1, 3), 1: (2, 3)}))


class Engine:
    """Asks for plans as an engine does, `delay_s` after each is there."""

    def __init__(self, made, delay_s=0.0):
        self.made, self.delay_s, self.epochs = made, delay_s, []
        self.death = asyncio.get_running_loop().create_future()
        self.entry = made.engines.register("engine", ProcessInfo(pid=1, node_id="a", gpu_ids=()), None)
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while True:
            await self.made.state.until(lambda: self.made.state.is_news(self.entry.epoch))
            epoch = self.made.state.plan.epoch
            await asyncio.sleep(self.delay_s)
            self.made.launcher.log.append(("engine has", epoch))
            self.made.engines.has_plan(self.entry, epoch)


def note_publications(made):
    """In the launcher's log, between the loads."""
    publish = made.state.publish

    def noted(*args, **options):
        publish(*args, **options)
        made.launcher.log.append(("plan", made.state.plan.epoch))

    made.state.publish = noted


def loads(made):
    return [event for event in made.launcher.log if event[0] == "load"]


def test_a_move_loads_publishes_waits_for_engines_and_then_unloads():
    async def play():
        made = await FakeCluster().up()
        note_publications(made)
        Engine(made, delay_s=3.0)
        await asyncio.sleep(4)
        made.launcher.log.clear()
        await made.changes._move(SWAPPED, Change("shuffle"))
        assert made.launcher.log == [
            ("load", 0, {0: (0, 1, 2), 1: (0, 1)}),  # what each has, and what it will have
            ("load", 1, {0: (1, 2, 3), 1: (2, 3)}),
            ("plan", 2),
            ("engine has", 2),
            ("load", 0, {0: (0, 2), 1: (0, 1)}),  # now what it has no more
            ("load", 1, {0: (1, 3), 1: (2, 3)}),
        ]
        assert made.state.plan.slices == SWAPPED.slices
        assert made.value("changes_total", kind="shuffle", outcome="done") == 1
        assert made.value("moved_experts_total") == 2

    virtual_time.run(play)


def test_an_engine_that_hangs_holds_a_move_up_for_five_seconds():
    async def play():
        made = await FakeCluster().up()
        Engine(made, delay_s=1000.0)
        before = virtual_time.now()
        await made.changes._move(SWAPPED, Change("shuffle"))
        assert virtual_time.now() - before == pytest.approx(4 * LOAD_S + ADOPTION_TIMEOUT_S)

    virtual_time.run(play)


def test_an_engine_that_is_silent_for_long_is_not_waited_for():
    async def play():
        made = await FakeCluster().up()
        Engine(made, delay_s=1000.0)
        await asyncio.sleep(100)
        before = virtual_time.now()
        await made.changes._move(SWAPPED, Change("shuffle"))
        assert virtual_time.now() - before == pytest.approx(4 * LOAD_S)

    virtual_time.run(play)


def test_a_load_that_fails_leaves_the_old_plan_and_what_it_needs():
    """The second shard finds no memory: the first lets go of what it has read for nothing."""

    async def play():
        made = await FakeCluster().up()
        epoch = made.state.plan.epoch
        first = made.actor(0)
        changing = asyncio.ensure_future(made.changes._move(SWAPPED, Change("rebalance")))
        await asyncio.sleep(LOAD_S + 0.5)
        made.launcher.errors.append(task_error(MemoryError("no room")))
        with pytest.raises(ClusterError, match=r"rebalance failed: a shard did not load .*no room"):
            await changing
        assert (made.state.plan.epoch, made.state.plan.slices) == (epoch, (HALF, OTHER_HALF))
        assert (first.experts, made.actor(1).experts) == (HALF, OTHER_HALF)
        assert made.value("changes_total", kind="rebalance", outcome="failed") == 1
        assert made.changes.work == ""
        assert "the old plan stays" in made.state.faults[-1].what

    virtual_time.run(play)


def test_a_shard_that_dies_during_a_move_leaves_the_old_plan():
    async def play():
        made = await FakeCluster().up()
        changing = asyncio.ensure_future(made.changes._move(SWAPPED, Change("rebalance")))
        await asyncio.sleep(LOAD_S + 0.5)
        made.actor(1).die()
        with pytest.raises(ClusterError, match="the old plan stays"):
            await changing
        await made.state.until(made.shards.all_up)
        assert made.state.plan.slices == (HALF, OTHER_HALF)
        assert (made.actor(0).experts, made.actor(1).experts) == (HALF, OTHER_HALF)

    virtual_time.run(play)


def test_changes_come_one_after_another():
    async def play():
        made = await FakeCluster().up()
        seen = []

        async def watch():
            while True:
                seen.append(made.changes.work.partition(" ")[0].rstrip(":"))
                await asyncio.sleep(0.25)

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(made.changes.shuffle(1, seed=0), made.changes.scale(3), made.changes.shuffle(1, seed=1))
        watching.cancel()
        order = [work for work, before in zip(seen, ["", *seen], strict=False) if work and work != before]
        assert order[0] == "shuffle"
        assert set(order[1:-1]) == {"adding", "add"}
        assert order[-1] == "shuffle"
        assert made.changes.busy is False

    virtual_time.run(play)


def test_shards_are_added_and_removed_and_hold_even_parts():
    async def play():
        made = await FakeCluster().up()
        assert await made.changes.scale(4) == "2 -> 4 expert shards"
        assert [sum(map(len, shard_slice.values())) for shard_slice in made.state.plan.slices] == [2, 2, 2, 2]
        for shard in made.shards:
            assert shard.handle.experts == made.state.plan.slices[shard.shard_id]
        assert await made.changes.scale(1) == "4 -> 1 expert shards"
        assert made.state.plan.slices == ({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)},)
        assert [name for name, _ in made.launcher.named()] == ["g:shard-0"]
        assert list(made.launcher.reserved) == ["g:shard-0"]
        done = {kind: made.value("changes_total", kind=kind, outcome="done") for kind in ("add", "remove")}
        assert done == {"add": 2, "remove": 3}

    virtual_time.run(play)


def test_a_shard_that_finds_no_room_is_given_up_and_the_cluster_stays_as_it_was():
    async def play():
        made = await FakeCluster().up()
        made.launcher.full = True
        before = virtual_time.now()
        with pytest.raises(SetupError, match=r"a process for shard 2 was not there after 600 s: .* no room for 1 CPUs"):
            await made.changes.scale(3)
        assert virtual_time.now() - before == pytest.approx(GROW_TIMEOUT_S)
        assert (len(made.shards), made.state.target) == (2, 2)
        assert made.state.plan.slices == (HALF, OTHER_HALF)
        assert made.value("changes_total", kind="add", outcome="failed") == 1

    virtual_time.run(play)


def test_shards_without_memory_for_all_experts_are_not_made_fewer():
    """Room for 5 of 8 experts in a shard."""

    async def play():
        made = await FakeCluster(replace(CONFIG, expert_memory_bytes=5 * FACTS.expert_bytes)).up()
        with pytest.raises(SetupError):
            await made.changes.scale(1)
        assert (len(made.shards), made.state.target) == (2, 2)
        assert made.value("changes_total", kind="remove", outcome="failed") == 1

    virtual_time.run(play)


def test_a_removal_whose_load_fails_leaves_as_many_shards_as_before():
    async def play():
        made = await FakeCluster().up()
        made.launcher.errors.append(task_error(MemoryError("no room")))
        with pytest.raises(ClusterError, match=r"remove shard 1 failed: .*no room"):
            await made.changes.scale(1)
        assert (len(made.shards), made.state.target) == (2, 2)
        assert made.state.plan.slices == (HALF, OTHER_HALF)
        assert made.value("changes_total", kind="remove", outcome="failed") == 1

    virtual_time.run(play)


@pytest.mark.parametrize("wrong", [0, 5])
def test_a_number_of_shards_that_cannot_be_is_refused(wrong):
    async def play():
        made = await FakeCluster().up()
        with pytest.raises(SetupError, match=f"{wrong} expert shards for 4 experts a layer: ask for 1 to 4"):
            await made.changes.scale(wrong)
        assert made.state.target == 2

    virtual_time.run(play)


def test_a_roll_gives_each_shard_a_new_process_one_at_a_time_and_is_no_fault():
    async def play():
        made = await FakeCluster(replace(CONFIG, spare_processes=True)).up()
        await made.spares.keep(["a"])  # of the old version
        before = [shard.status.process.pid for shard in made.shards]
        down = []
        publish = made.state.publish

        def noted(*args, **options):
            publish(*args, **options)
            down.append(set(made.state.plan.down))

        made.state.publish = noted
        assert await made.changes.roll() == "2 shards have new processes"
        after = [shard.status.process.pid for shard in made.shards]
        assert min(after) > max(before) + 1, "and not of the old spare process"
        assert down == [{0}, set(), {1}, set()]
        assert [shard.status.respawns for shard in made.shards] == [0, 0]
        assert made.state.faults == ()

    virtual_time.run(play)


def test_a_roll_leaves_the_shards_of_a_node_that_ray_drains_to_its_drain():
    async def play():
        made = await FakeCluster(replace(CONFIG, spare_processes=True)).up()
        before = [shard.status.process.pid for shard in made.shards]
        made.state.note_draining({"b": 1000.0})
        assert await made.changes.roll() == "1 shards have new processes, 1 more get theirs by leaving a node"
        after = [shard.status.process.pid for shard in made.shards]
        assert (after[0] > before[1], after[1]) == (True, before[1])

    virtual_time.run(play)


def test_a_change_that_nobody_waits_for_leaves_its_failure_as_a_fault():
    async def play():
        made = await FakeCluster().up()

        async def fail(error):
            raise error

        await made.changes.guard(fail(ClusterError("no way")))
        assert made.state.faults[-1].what == "no way"
        await made.changes.guard(fail(task_error(SetupError("no room")).as_instanceof_cause()))
        assert made.state.faults[-1].what == "no room"

    virtual_time.run(play)


def test_each_shard_has_room_for_its_part_or_what_its_memory_holds():
    """Two layers of four experts: eight, and sixteen of two copies each, and two more; on three shards, rounded up."""
    assert capacities(CONFIG, FACTS, 2) == [4, 4]
    assert capacities(replace(CONFIG, min_copies=2), FACTS, 2) == [8, 8]
    assert capacities(replace(CONFIG, redundant_experts=1), FACTS, 3) == [4, 4, 4]
    assert capacities(replace(CONFIG, expert_memory_bytes=35), FACTS, 1) == [3]


def test_a_shard_holds_the_experts_of_both_plans_during_a_move():
    assert union({0: (2, 0), 1: (3,)}, {0: (1,), 2: (5,)}) == {0: (0, 1, 2), 1: (3,), 2: (5,)}


def test_a_new_shard_has_an_empty_slice():
    assert padded(SWAPPED, 3).slices == (*SWAPPED.slices, {})
    assert padded(SWAPPED, 1) is SWAPPED


def test_a_change_is_named_with_its_shard():
    assert (str(Change("add", 3)), str(Change("rebalance"))) == ("add shard 3", "rebalance")


def test_no_more_copies_are_planned_than_shards_can_hold():
    """4 experts in each of 2 layers on 2 shards: room for 8 in each, however many are asked for."""
    config = replace(CONFIG, expert_shards=2, expert_memory_bytes=None, redundant_experts=MOST_CALLS)
    assert capacities(config, FACTS, 2) == [8, 8]
    assert first_plan(config, FACTS, 2) == first_plan(replace(config, redundant_experts=4), FACTS, 2)
    assert capacities(replace(config, expert_memory_bytes=MOST_BYTES), FACTS, 2) == [8, 8]
