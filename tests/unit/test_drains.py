"""Nodes that Ray drains are emptied before they go. On processes that are none.

Two layers of four experts; shard 0 is on node a, shard 1 on b. A process starts in no time and loads in a second.
"""

import asyncio
from dataclasses import replace

import pytest
import ray
import virtual_time
from control_fakes import CONFIG, LOAD_S, FakeActor, FakeCluster, task_error

from cluster.runtime.control.drains import FAREWELL_S, LOOK_S, RETRY_S, ROOM_S
from cluster.runtime.control.recall import recall
from cluster.runtime.control.spares import START_TIMEOUT_S
from cluster.status import ProcessInfo

HALF, OTHER_HALF, ALL = {0: (0, 1), 1: (0, 1)}, {0: (2, 3), 1: (2, 3)}, {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
SPARES = replace(CONFIG, spare_processes=True)


async def serving(config=CONFIG):
    """A cluster that looks for drains; its next look is half a LOOK_S away."""
    made = await FakeCluster(config).up()
    made.task = asyncio.create_task(made.drains.run())
    await asyncio.sleep(LOOK_S / 2)
    return made


async def drained(config=CONFIG, *, for_s, full=False):
    """A cluster whose node b Ray has drained for so long. full: no other node has room."""
    made = await serving(config)
    made.launcher.full, made.launcher.leaving = full, {"b": 1000.0}
    await asyncio.sleep(for_s)
    return made


def notes(made):
    return [fault.what for fault in made.state.faults]


def test_a_shards_successor_loads_and_takes_over_before_the_shard_ends():
    async def play():
        made = await serving()
        old = made.actor(1)
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(LOOK_S / 2 + LOAD_S / 2)
        assert made.actor(1) is old, "the successor loads"
        await asyncio.sleep(LOAD_S)
        new = made.actor(1)
        assert (new.node_id, new.experts, made.shards[1].node_id) == ("a", OTHER_HALF, "a")
        assert made.state.plan.down == frozenset(), "the shard was never away"
        await asyncio.sleep(2 * FAREWELL_S)
        assert old.death.done()
        assert list(made.launcher.reserved) == ["g:shard-0", new.name], "the node's room is given back"
        assert made.launcher.log == [("load", 1, OTHER_HALF), ("end", "g:shard-1")]
        assert (notes(made), made.shards[1].status.respawns) == ([], 0)
        assert made.value("changes_total", kind="drain", outcome="done") == 1

    virtual_time.run(play)


def test_a_shard_that_leaves_before_all_have_loaded_publishes_no_plan_without_the_others():
    async def play():
        made = FakeCluster()
        made.launcher.errors.extend(task_error(MemoryError("no memory")) for _ in range(3))
        made.begin()
        made.task = asyncio.create_task(made.drains.run())
        made.launcher.leaving = {"b": 1000.0}
        await made.state.until(lambda: made.state.published)
        assert made.shards.all_up()
        await asyncio.sleep(10)
        assert {shard.node_id for shard in made.shards} == {"a"}

    virtual_time.run(play)


def test_a_moved_shard_is_looked_after_as_any_other():
    async def play():
        made = await drained(for_s=10)
        made.actor(1).die()
        await asyncio.sleep(LOAD_S + 0.1)
        assert (made.actor(1).node_id, made.actor(1).experts) == ("a", OTHER_HALF)
        assert made.shards[1].status.respawns == 1

    virtual_time.run(play)


def test_a_shard_that_dies_on_a_node_that_drains_comes_up_on_another():
    """Its successor, which still loads, is of no more use. Nothing starts on the node, though its room is reserved."""

    async def play():
        made = await drained(for_s=LOOK_S / 2 + LOAD_S / 2)
        made.actor(1).die()
        await asyncio.sleep(5)
        assert (made.actor(1).node_id, made.actor(1).experts) == ("a", OTHER_HALF)
        assert len(made.launcher.reserved) == len(made.launcher.actors) == 2

    virtual_time.run(play)


def test_without_room_for_a_process_the_experts_go_to_shards_that_stay_and_come_back_with_room():
    async def play():
        made = await drained(for_s=LOOK_S + ROOM_S + 3, full=True)
        assert made.drains.leaving() == (("b", 1000.0, "no other node has room for shard 1 (1 CPU each)"),)
        assert notes(made) == ["Ray drains a node, and no other one has room for shard 1"]
        assert (made.actor(0).experts, made.state.slice_of(1)) == (ALL, {})
        await made.changes.rebalance()
        assert made.state.slice_of(1) == {}, "a rebalancing gives it none again"
        made.launcher.full = False
        await asyncio.sleep(10)
        assert made.actor(1).node_id == "a"
        assert sorted(len(ids) for ids in made.state.slice_of(1).values()) == [2, 2]
        assert made.drains.leaving() == (("b", 1000.0, ""),)

    virtual_time.run(play)


def test_a_drain_of_the_last_node_with_room_waits_and_is_told_once():
    async def play():
        made = await serving(replace(CONFIG, expert_shards=1))
        old = made.actor(0)
        made.launcher.leaving = {"a": float("inf"), "b": 5.0}
        await asyncio.sleep(100)
        assert made.actor(0) is old
        assert made.drains.leaving() == (
            ("a", float("inf"), "no other node has room for shard 0 (1 CPU each)"), ("b", 5.0, ""),
        )  # fmt: skip
        assert notes(made) == ["Ray drains a node, and no other one has room for shard 0"]
        assert made.value("leaving_shards") == 1

    virtual_time.run(play)


def test_experts_for_which_the_others_have_no_memory_stay():
    async def play():
        made = await drained(replace(CONFIG, expert_memory_bytes=40), for_s=60, full=True)
        assert made.state.slice_of(1) == OTHER_HALF
        assert notes(made) == [
            "Ray drains a node, and no other one has room for shard 1",
            "1 expert shards have room for 4 copies of experts, not for 1 of each of 4 in 2 layers: "
            "add shards or memory, or lower --min-copies",
        ]
        made.launcher.full = False
        await asyncio.sleep(10)
        assert made.actor(1).node_id == "a"

    virtual_time.run(play)


def test_a_successor_that_does_not_load_is_ended_and_another_tried():
    async def play():
        made = await serving()
        old = made.actor(1)
        made.launcher.errors.append(task_error(MemoryError("no memory")))
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(LOOK_S / 2 + LOAD_S + 0.5)
        assert made.actor(1) is old
        assert len(made.launcher.actors) == 2
        assert notes(made) == [
            "drain shard 1 failed: its successor did not load (MemoryError('no memory')); the shard stays for now"
        ]
        await asyncio.sleep(20)
        assert made.actor(1).node_id == "a"

    virtual_time.run(play)


def test_an_engine_that_ends_on_a_node_that_drains_is_no_fault():
    async def play():
        made = await serving()
        for node_id in "ab":
            engine = FakeActor(made.launcher, f"engine on {node_id}", -1, node_id)
            made.engines.register(engine.name, ProcessInfo(pid=engine.pid, node_id=node_id, gpu_ids=()), engine)
            made.launcher.actors[engine.name] = engine
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(10)
        for node_id in "ab":
            made.launcher.find(f"engine on {node_id}").die()
        await asyncio.sleep(1)
        assert notes(made) == ["attention replica engine on a lost its engine"]
        assert made.engines.known() == ()

    virtual_time.run(play)


def test_a_node_that_goes_before_there_is_room_leaves_nothing_behind():
    async def play():
        made = await drained(for_s=20, full=True)
        made.launcher.leaving = {}
        made.actor(1).die()
        made.launcher.reserved.pop("g:shard-1")
        await asyncio.sleep(5)
        assert list(made.launcher.reserved) == ["g:shard-0"]
        made.launcher.full = False
        await asyncio.sleep(20)
        assert sorted(len(ids) for ids in made.state.slice_of(1).values()) == [2, 2], "it has experts again"

    virtual_time.run(play)


def test_spare_processes_leave_and_one_elsewhere_becomes_the_successor():
    async def play():
        made = await serving(SPARES)
        await made.spares.keep(["a", "b"])
        await asyncio.sleep(1)
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(5)
        assert made.shards[1].status.actor.startswith("g:spare-")
        await made.spares.keep(["a", "b"])
        await asyncio.sleep(1)
        assert {actor.node_id for _, actor in made.launcher.named()} == {"a"}

    virtual_time.run(play)


@pytest.mark.parametrize(
    ("draining", "at_once", "later"),
    [("head", True, True), ("head b", False, True), ("head a b", False, False)],
    ids=["no shard leaves", "a shard leaves", "shards wait for room"],
)
def test_the_controller_leaves_its_node_after_the_shards(draining, at_once, later):
    async def play():
        made = await serving()
        made.launcher.leaving = dict.fromkeys(draining.split(), 1000.0)
        await asyncio.sleep(LOOK_S)
        assert (made.launcher.restarts > 0) == at_once
        await asyncio.sleep(10)
        assert (made.launcher.restarts > 0) == later

    virtual_time.run(play)


def test_a_process_that_starts_slowly_where_it_has_room_is_waited_for():
    """It waits for a spare process there, which does not answer."""

    async def play():
        made = await serving(SPARES)
        start = made.launcher.start_spare

        def start_stopped(*arguments):
            actor = start(*arguments)
            actor.stopped = True
            return actor

        made.launcher.start_spare = start_stopped
        await made.spares.keep(["a"])
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(4 * ROOM_S)
        assert made.drains.leaving() == (("b", 1000.0, ""),)
        assert (notes(made), made.state.slice_of(1)) == ([], OTHER_HALF)
        await asyncio.sleep(START_TIMEOUT_S)
        assert made.actor(1).node_id == "a"

    virtual_time.run(play)


def test_what_is_told_of_nodes_that_leave_is_plain_for_processes_of_an_older_version():
    async def play():
        made = await drained(for_s=LOOK_S)
        assert [type(node) for node in made.drains.leaving()] == [tuple]

    virtual_time.run(play)


def test_rays_gcs_takes_processes_and_places_away_in_a_thread_of_its_own():
    """Of the shard that left, and of a successor that is of no use; a GCS that is away would hold the event loop up."""

    async def play():
        made = await drained(for_s=10)
        made.launcher.leaving, made.launcher.full = {"a": 1000.0}, True
        await asyncio.sleep(LOOK_S)
        assert len(made.launcher.places()) == 4, "the successors of both wait for room"
        made.launcher.leaving = {}
        await asyncio.sleep(3 * LOOK_S)
        assert made.launcher.places().keys() == {"g:shard-0", made.shards[1].name}
        await made.changes.scale(1)
        assert list(made.launcher.places()) == ["g:shard-0"]
        assert made.launcher.blocking == []

    virtual_time.run(play)


def test_a_shard_that_cannot_be_taken_away_after_its_move_has_moved(caplog):
    async def play():
        made = await serving()
        give_back = made.launcher.give_back

        def fail(name):
            give_back(name)
            raise ray.exceptions.RaySystemError("no answer")

        made.launcher.give_back = fail
        made.launcher.leaving = {"b": 1000.0}
        await asyncio.sleep(10)
        assert (made.actor(1).node_id, notes(made)) == ("a", [])
        assert made.value("changes_total", kind="drain", outcome="done") == 1
        assert "g:shard-1 is not taken away" in caplog.text

    virtual_time.run(play)


def test_experts_that_do_not_come_back_are_tried_again_after_a_pause():
    """Shard 1 is up again, and its load of experts fails."""

    async def play():
        made = await drained(for_s=LOOK_S + ROOM_S + 3, full=True)
        made.launcher.full = False
        await made.state.until(lambda: made.shards[1].node_id == "a")
        made.launcher.errors.append(task_error(MemoryError("no memory")))
        await asyncio.sleep(RETRY_S)
        assert "no memory" in notes(made)[-1]
        assert (made.state.slice_of(1), made.changes.vacated) == ({}, {1})
        num_notes = len(notes(made))
        await asyncio.sleep(RETRY_S + 2 * LOOK_S + 2 * LOAD_S)
        assert sorted(len(ids) for ids in made.state.slice_of(1).values()) == [2, 2]
        assert (len(notes(made)), made.changes.vacated) == (num_notes, set())

    virtual_time.run(play)


def test_a_controller_that_dies_over_a_move_leaves_one_process_and_one_place():
    """Its successor finds both; no plan was published with the newer one."""

    async def play():
        made = await drained(for_s=LOOK_S / 2 + LOAD_S / 2)
        assert len(made.launcher.actors) == 3
        _, left = await recall("g", made.launcher)
        assert left[1] == ("g:shard-1", "g:shard-1")
        assert sorted(made.launcher.reserved) == sorted(made.launcher.actors) == ["g:shard-0", "g:shard-1"]
        assert made.launcher.blocking == []
        made.task.cancel()
        made.drains.close()

    virtual_time.run(play)
