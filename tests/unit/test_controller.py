"""The expert controller without Ray: its lease, what it takes over, what a redeployment changes."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import virtual_time
from control_fakes import CONFIG, FACTS, FakeCluster, FakeLauncher

from cluster.errors import SetupError
from cluster.runtime.control import controller as module
from cluster.runtime.control.controller import ExpertController
from cluster.runtime.control.expert_facts import ExpertFacts
from cluster.runtime.control.recall import Left, recall
from cluster.runtime.workers.protocol import LONG_POLL_S
from cluster.status import ProcessInfo

PROCESS = ProcessInfo(pid=1, node_id="a", gpu_ids=())
LEASE_S = 60.0


@pytest.fixture
def make(monkeypatch):
    """From a launcher, a controller on it."""

    def leave():
        raise asyncio.CancelledError  # the task ends, as the process would

    monkeypatch.setattr(module, "prepare_process", lambda: None)
    monkeypatch.setattr(module, "process_info", lambda: PROCESS)
    monkeypatch.setattr(module, "read_expert_facts", lambda config: FACTS)
    monkeypatch.setattr(module.ray.actor, "exit_actor", leave)

    def made(launcher, config=CONFIG):
        return ExpertController(
            "g", config, collect_metrics=False, lease_s=LEASE_S, launcher=launcher, clock=virtual_time.now
        )

    return made


def test_a_plan_is_given_to_who_asks_once_all_shards_are_up(make):
    async def play():
        controller = make(FakeLauncher())
        membership = await controller.wait_plan("llm", PROCESS, None, 0)
        assert (membership.plan.epoch, sorted(membership.handles)) == (1, [0, 1])
        before = virtual_time.now()
        assert await controller.wait_plan("llm", PROCESS, None, 1) is None
        assert virtual_time.now() - before == pytest.approx(LONG_POLL_S)

    virtual_time.run(play)


def test_a_failure_that_somebody_notes_is_a_fault_once(make):
    async def play():
        controller = make(FakeLauncher())
        await controller.status()
        controller.state.note("rebalance failed: no room")
        for what in ("rebalance failed: rebalance failed: no room", "3 expert shards failed: no GPU"):
            await controller.note_fault(what)
        faults = [fault.what for fault in (await controller.status()).faults]
        assert faults == ["rebalance failed: no room", "3 expert shards failed: no GPU"]

    virtual_time.run(play)


def test_a_younger_controller_goes_beyond_the_plan_of_its_callers(make):
    async def play():
        controller = make(FakeLauncher())
        await controller.wait_plan("llm", PROCESS, None, 0)
        assert (await controller.wait_plan("engine", PROCESS, None, 7)).plan.epoch == 8

    virtual_time.run(play)


def test_shards_that_nobody_needs_are_taken_down_however_often_their_status_is_asked_for(make):
    """`moe-cluster top` asks each second; a forgotten one must not keep a cluster alive."""

    async def play():
        controller = make(FakeLauncher())
        await controller.wait_plan("llm", PROCESS, None, 0)
        for _ in range(int(LEASE_S) + 10):
            await controller.status()
            await asyncio.sleep(1)
        assert controller._launcher.named() == []
        assert controller._launcher.reserved == {}

    virtual_time.run(play)


@pytest.mark.parametrize("how", ["an ingress", "an engine"])
def test_shards_that_somebody_needs_stay(make, how):
    async def play():
        controller = make(FakeLauncher())
        await controller.wait_plan("llm", PROCESS, None, 0)
        for _ in range(20):
            await (controller.renew_lease() if how == "an ingress" else controller.wait_plan("llm", PROCESS, None, 1))
            await asyncio.sleep(LEASE_S / 2)
        assert len(controller._launcher.named()) == 2
        assert (await controller.status()).lease_by_renewal

    virtual_time.run(play)


def test_a_successor_takes_up_the_shards_their_plan_and_their_number(make):
    async def play():
        before = await FakeCluster().up()
        await before.changes.scale(3)
        left = [before.actor(i) for i in range(3)]
        for task in before.supervision._tasks:
            task.cancel()
        before.launcher.log.clear()
        controller = make(before.launcher)
        membership = await controller.wait_plan("engine", PROCESS, None, 0)
        assert membership.plan.slices == before.state.plan.slices
        assert membership.plan.epoch > before.state.plan.epoch
        assert list(membership.handles.values()) == left
        assert (await controller.status()).target_shards == 3
        assert [event for event in before.launcher.log if event[0] == "load"] == [], "nothing is read again"

    virtual_time.run(play)


def test_a_successor_ends_the_change_that_its_predecessor_died_over(make):
    async def play():
        before = await FakeCluster().up()
        before.state.aim(3)
        await asyncio.sleep(0.1)
        for task in before.supervision._tasks:
            task.cancel()
        controller = make(before.launcher)
        await controller.wait_plan("engine", PROCESS, None, 0)
        await asyncio.sleep(60)
        assert len(controller.state.plan.slices) == 3

    virtual_time.run(play)


def test_the_newest_record_counts_and_spare_processes_are_ended():
    async def play():
        made = await FakeCluster(replace(CONFIG, spare_processes=True)).up()
        await made.spares.keep(["b"])
        for target, deaf in ((3, 1), (4, 0)):  # each misses one of the two records
            made.actor(deaf).stopped = True
            made.state.aim(target)
            await asyncio.sleep(0.1)
            made.actor(deaf).stopped = False
        record, left = await recall("g", made.launcher)
        assert record.target == 4
        assert left == {i: Left(f"g:shard-{i}", f"g:shard-{i}") for i in (0, 1)}
        assert [name for name, _ in made.launcher.named()] == ["g:shard-0", "g:shard-1"]

    virtual_time.run(play)


def test_a_shard_that_does_not_answer_is_no_one_that_is_found():
    async def play():
        made = await FakeCluster().up()
        made.actor(0).stopped = True
        _, left = await recall("g", made.launcher)
        assert left == {0: Left("", "g:shard-0"), 1: Left("g:shard-1", "g:shard-1")}

    virtual_time.run(play)


def test_a_checkpoint_that_cannot_be_read_is_told_to_who_asks(make, monkeypatch):
    def fail(config):
        raise SetupError("no such folder")

    monkeypatch.setattr(module, "read_expert_facts", fail)

    async def play():
        controller = make(FakeLauncher())
        for ask in (controller.wait_plan("llm", PROCESS, None, 0), controller.scale(2), controller.rebalance()):
            with pytest.raises(SetupError, match="no such folder"):
                await ask
        assert (await controller.status()).failure == "no such folder"

    virtual_time.run(play)


def test_a_redeployed_configuration_reaches_what_runs_already(make):
    async def play():
        controller = make(FakeLauncher())
        await controller.wait_plan("llm", PROCESS, None, 0)
        await controller.apply(replace(CONFIG, shard_timeout_s=5.0, expert_shards=3))
        await asyncio.sleep(60)
        assert len(controller.state.plan.slices) == 3
        stopped = controller.shards[0].handle
        stopped.stopped = True
        await asyncio.sleep(2 + 5 + 0.1)  # a question each 2 s, and now 5 s for its answer
        assert stopped.death.done()

    virtual_time.run(play)


def test_a_configuration_that_is_applied_again_does_not_undo_a_scaling_by_hand(make):
    async def play():
        controller = make(FakeLauncher())
        await controller.wait_plan("llm", PROCESS, None, 0)
        await controller.scale(4)
        await controller.apply(CONFIG)
        await asyncio.sleep(30)
        assert len(controller.shards) == 4

    virtual_time.run(play)


def test_a_dense_model_has_a_plan_at_once_and_no_shards_to_change(make, monkeypatch):
    dense = ExpertFacts(sparse_layers=(), num_experts=0, expert_bytes=0)
    monkeypatch.setattr(module, "read_expert_facts", lambda config: dense)

    async def play():
        controller = make(FakeLauncher())
        membership = await controller.wait_plan("engine", PROCESS, None, 0)
        assert (membership.plan.num_shards, membership.handles, virtual_time.now()) == (0, {}, 0.0)
        await controller.apply(replace(CONFIG, expert_shards=3))
        await asyncio.sleep(30)
        for ask in (controller.scale(2), controller.rebalance(), controller.shuffle(1, 0)):
            with pytest.raises(SetupError, match="this model is dense"):
                await ask
        status = await controller.status()
        assert (status.dense, status.covered, status.target_shards, status.faults) == (True, True, 0, ())

    virtual_time.run(play)


def test_a_restarted_controller_of_a_dense_model_hears_of_the_slots_before_it_gives_one(make, monkeypatch):
    """No shard tells it that it is a successor. The living engine has slot 0 and asks a second later."""
    dense = ExpertFacts(sparse_layers=(), num_experts=0, expert_bytes=0)
    monkeypatch.setattr(module, "read_expert_facts", lambda config: dense)

    async def play():
        engine = SimpleNamespace(hold=SimpleNamespace(remote=asyncio.get_running_loop().create_future))
        launcher = FakeLauncher()
        launcher.restarted = lambda: True
        controller = make(launcher)
        new = asyncio.create_task(controller.slot("new", PROCESS, engine))
        await asyncio.sleep(1)
        asking = asyncio.create_task(controller.wait_plan("old", replace(PROCESS, slot=0), engine, 5))
        assert await new == 1
        asking.cancel()

    virtual_time.run(play)
