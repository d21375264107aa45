"""Follows the loads of experts and replicas, and has experts moved where the configuration says so."""

import asyncio
import time

import ray

from cluster.experts import eplb
from cluster.runtime.control.changes import PlacementChanges
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.control.state import ClusterState
from cluster.status import ReplicaStatus

INTERVAL_S = 2.0  # between two looks
TIMEOUT_S = 2.0


class LoadWatch:
    """Used by the controller's event loop, which runs it."""

    def __init__(self, state: ClusterState, changes: PlacementChanges) -> None:
        self._state = state
        self._changes = changes

    async def run(self) -> None:
        """Follows the loads of the experts, and rebalances by them where the configuration says so."""
        balanced_at = time.monotonic()
        while True:
            await asyncio.sleep(INTERVAL_S)
            await asyncio.gather(
                *(self._measure_shard(shard) for shard in self._state.shards.values()),
                *(self._measure_replica(replica) for replica in self._state.replicas.values()),
            )
            if self._state.plan is None or not self._state.published:
                continue
            imbalance = eplb.imbalance(self._state.plan, self._state.rates())
            self._state.metrics.imbalance(imbalance)
            due = 0 < self._state.config.rebalance_interval_s <= time.monotonic() - balanced_at
            if due and imbalance > self._state.config.rebalance_threshold and not self._changes.changing.locked():
                balanced_at = time.monotonic()
                await self._changes.guard(self._changes.rebalance())

    async def _measure_shard(self, shard: ShardProcess) -> None:
        if shard.handle is None or self._state.load is None:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                counters = await shard.handle.expert_tokens.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return  # its supervisor finds out why
        if counters is not None:
            own = counters[list(self._state.sparse_layers)].numpy()
            self._state.load.observe((shard.shard_id, shard.status.process), own, time.monotonic())

    async def _measure_replica(self, replica: ReplicaStatus) -> None:
        if replica.engine is None:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                replica.stats = await replica.engine.stats.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return  # it is loading, or on its way out
