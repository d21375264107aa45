"""The loads of experts and engines are followed, and experts move where the configuration says so."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import virtual_time
from control_fakes import CONFIG, FakeCluster

from cluster.runtime.control.load_watch import INTERVAL_S, TIMEOUT_S
from cluster.status import ProcessInfo
from cluster.types import EngineStats

POLICY = replace(CONFIG, rebalance_interval_s=10.0, rebalance_threshold=1.5)
SKEWED = torch.tensor([[100, 0, 0, 0], [100, 0, 0, 0]])  # all rows go to experts of shard 0: twice its even part


class Rebalances:
    def __init__(self):
        self.times, self.busy = [], False

    async def rebalance(self):
        self.times.append(virtual_time.now())


async def watched(made, tokens):
    """A running watch, while shard 0 computes `tokens` each second."""
    rebalances = Rebalances()

    async def compute():
        while True:
            await asyncio.sleep(1)
            made.actor(0).counters = made.actor(0).counters + tokens

    tasks = [
        asyncio.create_task(compute()),
        asyncio.create_task(made.loads.run(rebalances.rebalance, lambda: rebalances.busy)),
    ]
    return rebalances, tasks


def test_rates_are_tokens_a_second_of_each_layer_and_expert():
    async def play():
        made = await FakeCluster().up()
        await watched(made, torch.tensor([[6, 0, 0, 0], [0, 3, 0, 0]]))
        await asyncio.sleep(120)
        np.testing.assert_allclose(made.loads.rates(), [[6, 0, 0, 0], [0, 3, 0, 0]], rtol=0.05)

    virtual_time.run(play)


def test_a_skewed_load_is_followed_once_in_an_interval():
    async def play():
        made = await FakeCluster(POLICY).up()
        begun = virtual_time.now()
        rebalances, _ = await watched(made, SKEWED)
        await asyncio.sleep(31)
        assert [time - begun for time in rebalances.times] == pytest.approx([10, 20, 30])
        assert made.value("imbalance") == pytest.approx(2.0)

    virtual_time.run(play)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(POLICY, rebalance_threshold=2.5)], ids=["no policy", "below the threshold"]
)
def test_a_load_is_not_followed_where_nobody_asks_for_it(config):
    async def play():
        made = await FakeCluster(config).up()
        rebalances, _ = await watched(made, SKEWED)
        await asyncio.sleep(60)
        assert rebalances.times == []

    virtual_time.run(play)


def test_a_change_under_way_is_waited_for():
    async def play():
        made = await FakeCluster(POLICY).up()
        rebalances, _ = await watched(made, SKEWED)
        rebalances.busy = True
        await asyncio.sleep(25)
        assert rebalances.times == []
        rebalances.busy = False
        await asyncio.sleep(INTERVAL_S)
        assert len(rebalances.times) == 1

    virtual_time.run(play)


def test_a_silent_shard_does_not_hold_up_what_is_known_of_others():
    async def play():
        made = await FakeCluster().up()
        made.actor(1).stopped = True
        before = virtual_time.now()
        await made.loads.look()
        assert virtual_time.now() - before == pytest.approx(TIMEOUT_S)
        made.actor(0).counters = SKEWED
        await made.loads.look()
        assert made.loads.rates()[0, 0] > 0

    virtual_time.run(play)


def test_an_engines_figures_are_those_that_it_gave_last():
    async def play():
        made = await FakeCluster().up()
        stats = EngineStats(running=1, waiting=2, used_blocks=3, num_blocks=4, generated_tokens=5, at=6.0)
        answers = iter([stats, TimeoutError()])

        async def answer():
            if isinstance(value := next(answers), Exception):
                raise value
            return value

        engine = SimpleNamespace(
            stats=SimpleNamespace(remote=answer), hold=SimpleNamespace(remote=lambda: asyncio.sleep(1000))
        )
        known = made.engines.register("r", ProcessInfo(pid=1, node_id="a", gpu_ids=()), engine)
        for _ in range(2):
            await made.loads.look()
            assert known.stats == stats

    virtual_time.run(play)
