"""Follows the loads of experts and replicas, and has experts moved where the configuration says so."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import ray

from cluster.experts import eplb
from cluster.experts.load_meter import LoadMeter, Loads
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.engines import Engines
from cluster.runtime.control.expert_facts import ExpertFacts
from cluster.runtime.control.shards import Shard, Shards
from cluster.runtime.control.state import ClusterState
from cluster.runtime.workers.protocol import expert_tokens
from cluster.status import ReplicaStatus

HALF_LIFE_S = 60.0  # of the loads that placement follows: longer than a burst, shorter than a change of traffic
INTERVAL_S = 2.0  # between two looks
TIMEOUT_S = 2.0


class LoadWatch:
    """Used by the controller's event loop, which runs it."""

    def __init__(
        self,
        state: ClusterState,
        shards: Shards,
        engines: Engines,
        metrics: ControllerMetrics,
        facts: ExpertFacts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._shards, self._engines, self._metrics = state, shards, engines, metrics
        self._layers, self._clock = list(facts.sparse_layers), clock
        self._meter = LoadMeter(len(self._layers), facts.num_experts, half_life_s=HALF_LIFE_S)

    def rates(self) -> Loads:
        """[sparse layers, experts] tokens/s."""
        return self._meter.rates(self._clock())

    async def run(self, rebalance: Callable[[], Coroutine[Any, Any, None]], busy: Callable[[], bool]) -> None:
        """Looks for ever; rebalances where the configuration says so.

        busy: whether a change of placement is under way.
        """
        balanced_at = self._clock()
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.look()
            if not self._state.published:
                continue
            imbalance = eplb.imbalance(self._state.plan, self.rates())
            self._metrics.imbalance(imbalance)
            config = self._state.config
            due = 0 < config.rebalance_interval_s <= self._clock() - balanced_at
            if due and imbalance > config.rebalance_threshold and not busy():
                balanced_at = self._clock()
                await rebalance()

    async def look(self) -> None:
        """Asks each shard and each engine once."""
        await asyncio.gather(
            *map(self._measure_shard, self._shards), *map(self._measure_replica, self._engines.known())
        )

    async def _measure_shard(self, shard: Shard) -> None:
        if shard.handle is None:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                counters = await expert_tokens(shard.handle)
        except (TimeoutError, ray.exceptions.RayError):
            return  # its supervision finds out why
        if counters is not None:
            source = shard.shard_id, shard.status.process
            self._meter.observe(source, counters[self._layers], self._clock())

    async def _measure_replica(self, replica: ReplicaStatus) -> None:
        if replica.engine is None:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                replica.stats = await replica.engine.stats.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return  # it is loading, or on its way out
