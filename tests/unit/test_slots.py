"""Metrics name places: an engine that follows a dead one goes on with its figures, so that series do not grow."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from test_metrics import samples

from cluster.config import ClusterConfig
from cluster.metrics import NodeCollector, multiprocess_env
from cluster.runtime.control.controller import ExpertController
from cluster.runtime.workers.directory import take_slot
from cluster.status import ProcessInfo

PROCESS = ProcessInfo(pid=1, node_id="n", gpu_ids=())
KILLS = 50


class Engine:
    """Its `hold` ends with its death."""

    def __init__(self):
        self.death = asyncio.get_running_loop().create_future()
        self.hold = SimpleNamespace(remote=lambda: self.death)

    async def die(self):
        self.death.set_exception(ray.exceptions.RayActorError())
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
def new_controller(monkeypatch):
    monkeypatch.setattr("cluster.runtime.control.controller.prepare_process", lambda: None)

    def make():
        controller = ExpertController("group", ClusterConfig(model="model"), collect_metrics=False)
        controller._starting = asyncio.ensure_future(asyncio.sleep(0))
        return controller

    return make


def test_an_engine_gets_the_lowest_slot_that_no_living_one_has(new_controller):
    async def play():
        controller, engines = new_controller(), [Engine() for _ in range(6)]
        slots = [await controller.slot(f"r{i}", PROCESS, engine) for i, engine in enumerate(engines[:3])]
        assert slots == [0, 1, 2]
        assert await controller.slot("r1", PROCESS, engines[1]) == 1, "asked again, as after a lost answer"
        await engines[1].die()
        assert await controller.slot("r3", PROCESS, engines[3]) == 1
        await engines[0].die()
        await engines[2].die()
        assert await controller.slot("r4", PROCESS, engines[4]) == 0
        assert await controller.slot("r5", PROCESS, engines[5]) == 2

    asyncio.run(play())


def test_two_engines_of_a_rollout_have_two_slots_and_the_next_rollout_the_same_two(new_controller):
    async def play():
        controller, old, seen = new_controller(), None, []
        for generation in range(6):
            new = Engine()
            seen.append(await controller.slot(f"g{generation}", PROCESS, new))
            if old is not None:
                await old.die()
            old = new
        assert seen == [0, 1, 0, 1, 0, 1]

    asyncio.run(play())


def test_a_controller_that_comes_new_learns_the_slots_of_engines_that_live(new_controller):
    """They say it with each question for the plan; one that starts waits for them."""

    async def play():
        controller = new_controller()
        living = Engine()
        controller.engines.register("old", replace(PROCESS, slot=1), living)
        assert [await controller.slot(name, PROCESS, Engine()) for name in "ab"] == [0, 2]
        controller.engines.register("from an older version", PROCESS, Engine())
        assert controller.engines.find("from an older version").process.slot == 3

    asyncio.run(play())


def test_a_holder_without_an_engine_takes_no_slot(new_controller):
    async def play():
        controller = new_controller()
        controller.engines.register("offline", PROCESS, None)
        assert await controller.slot("r", PROCESS, Engine()) == 0

    asyncio.run(play())


def test_an_older_controller_gives_no_slot():
    assert take_slot(SimpleNamespace(), "r", PROCESS, None).slot == -1


# As many engine processes one after another as slots come in, each killed when it has counted.
ENGINES = """
import os, signal, sys
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry, report_version
for line in sys.stdin:
    child = os.fork()
    if not child:
        registry = report_version(new_registry(), "engine")
        engine, dispatch = EngineMetrics(registry, line.strip()), DispatchMetrics(registry, line.strip())
        engine.state(running=1, held=0, waiting=0, used_blocks=1, total_blocks=64)
        engine.step(0.02, num_prefill_tokens=5, num_decode_tokens=3, num_seqs=4)
        for shard_id in (0, 1):
            dispatch.sent(shard_id, rows=4, num_bytes=100)
            dispatch.returned(shard_id, seconds=0.003, num_bytes=80)
        dispatch.plan_epoch(1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_fifty_killed_engines_leave_the_series_of_two(new_controller, tmp_path):
    """One replica, whose engine dies KILLS times; each second time its successor lives before it is gone."""
    collector = NodeCollector(tmp_path, "127.0.0.1", 0)
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINES], env={**os.environ, **multiprocess_env(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    async def play():
        controller, last, counted = new_controller(), None, []
        for generation in range(KILLS):
            if last is not None and generation % 2:
                await last.die()
            engine = Engine()
            slot = await controller.slot(f"r{generation}", PROCESS, engine)
            if last is not None and not generation % 2:
                await last.die()
            last = engine
            print(slot, file=process.stdin, flush=True)
            assert process.stdout.readline() == "killed\n"
            counted.append(samples(collector.render()))
        return counted

    try:
        counted = asyncio.run(play())
    finally:
        process.stdin.close()
        process.wait()
        collector.close()
    sizes = [len(scrape) for scrape in counted]
    assert sizes[3:] == sizes[3:4] * (KILLS - 3), "no series after those of two places"
    rows = [value for name, value in counted[-1].items() if name.startswith("moecluster_dispatch_rows_total")]
    assert sum(rows) == KILLS * 2 * 4, "what the dead have counted counts on"
    assert not any("running_sequences" in name or "plan_epoch" in name for name in counted[-1]), "no gauge of the dead"
