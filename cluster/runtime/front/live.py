"""Reads a cluster on Ray for those who watch: shards and engines directly, the figures of each node's collector."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import ray

from cluster.errors import Unavailable
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import NAMESPACE, metrics_name
from cluster.runtime.workers.protocol import expert_tokens
from cluster.serving.live.reading import Counts, Reading
from cluster.status import ClusterStatus, ReplicaStatus, ShardStatus
from cluster.types import EngineStats

TIMEOUT_S = 2.0
FIGURES_PERIOD_S = 2.0  # a scrape takes tens of milliseconds of a node's collector


class RayLiveSource:
    """For one event loop. status: as the ingress last read it, None before the first time."""

    def __init__(self, group: str, status: Callable[[], ClusterStatus | None], gcs: GcsThread) -> None:
        self._group, self._status, self._gcs = group, status, gcs
        self._actors: dict[str, Any] = {}
        self._figures_at = -FIGURES_PERIOD_S

    async def read(self) -> Reading:
        """Raises Unavailable."""
        status = self._status()
        if status is None:
            raise Unavailable("the expert controller has not answered yet: try again")
        self._forget_others(status)
        counters, stats, exposition = await asyncio.gather(
            self._counters(status), self._stats(status.replicas), self._exposition(status)
        )
        return Reading(status=status, counters=counters, stats=stats, exposition=exposition, at=time.monotonic())

    @property
    def known_actors(self) -> frozenset[str]:
        """The names of those that it has found."""
        return frozenset(self._actors)

    def _forget_others(self, status: ClusterStatus) -> None:
        """Lets those actors go that the cluster has no more."""
        living = {shard.actor for shard in status.shards} | self._collectors(status)
        self._actors = {name: actor for name, actor in self._actors.items() if name in living}

    def _collectors(self, status: ClusterStatus) -> set[str]:
        """The names of the actors that collect figures, one a node."""
        processes = [status.process, *(s.process for s in status.shards), *(r.process for r in status.replicas)]
        return {metrics_name(self._group, process.node_id) for process in processes if process is not None}

    async def _counters(self, status: ClusterStatus) -> Mapping[tuple[int, int], Counts]:
        if status.plan is None:
            return {}
        layers = list(status.plan.layer_ids)
        shards = [shard for shard in status.shards if shard.state == "up" and shard.process is not None]
        counted = await asyncio.gather(*(self._ask(shard.actor, expert_tokens) for shard in shards))
        return {
            _source(shard): counts[layers] for shard, counts in zip(shards, counted, strict=True) if counts is not None
        }

    async def _stats(self, replicas: Iterable[ReplicaStatus]) -> Mapping[str, EngineStats]:
        known = {replica.name: replica.stats for replica in replicas}
        engines = {replica.name: replica.engine for replica in replicas if replica.engine is not None}
        answers = await asyncio.gather(*(_answer(engine.stats.remote()) for engine in engines.values()))
        found = {name: stats or known[name] for name, stats in zip(engines, answers, strict=True)}
        return {name: stats for name, stats in found.items() if stats is not None}

    async def _exposition(self, status: ClusterStatus) -> str:
        now = time.monotonic()
        if now - self._figures_at < FIGURES_PERIOD_S:
            return ""
        self._figures_at = now
        texts = await asyncio.gather(*(self._ask(name, _render) for name in sorted(self._collectors(status))))
        return "" if None in texts else b"".join(filter(None, texts)).decode()

    async def _ask(self, name: str, ask: Callable[[Any], Awaitable[Any]]) -> Any | None:
        """The answer of a named actor, which `ask` asks; None where there is none."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                actor = self._actors.get(name) or await self._gcs.ask(ray.get_actor, name, NAMESPACE)
        except (TimeoutError, ValueError):
            return None  # Ray's GCS is away; or the actor is not made yet, or gone
        self._actors[name] = actor
        answer = await _answer(ask(actor))
        if answer is None:
            self._actors.pop(name, None)  # perhaps dead: another one gets the name
        return answer


def _render(collector: Any) -> Awaitable[Any]:
    asked: Awaitable[Any] = collector.render.remote()
    return asked


async def _answer(asked: Any) -> Any | None:
    """None when it does not come in time, or with a failure."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asked
    except (TimeoutError, ray.exceptions.RayError):
        return None


def _source(shard: ShardStatus) -> tuple[int, int]:
    assert shard.process is not None
    return shard.shard_id, shard.process.pid
