"""Asks this node's collector for the figures of all its processes, for `/metrics` of the HTTP front."""

import asyncio
from contextlib import suppress
from typing import Any

import ray

from cluster.errors import Unavailable
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import NAMESPACE, metrics_name

TIMEOUT_S = 10.0


class NodeScraper:
    """For one event loop. The collector that is known answers while Ray's GCS is away."""

    def __init__(self, group: str, gcs: GcsThread) -> None:
        self._group, self._gcs = group, gcs
        self._collector: Any | None = None

    async def scrape(self) -> bytes:
        """Returns a scrape in Prometheus' text format. Raises Unavailable."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._ask()
        except (TimeoutError, ValueError, AttributeError, ray.exceptions.RayError) as error:
            raise Unavailable("the collector of this node's metrics does not answer: try again") from error

    async def _ask(self) -> bytes:
        if self._collector is not None:
            with suppress(ray.exceptions.RayActorError):  # another one may have its name
                return await self._collector.render.remote()  # type: ignore[no-any-return]
        name = metrics_name(self._group, ray.get_runtime_context().get_node_id())
        collector: Any = await self._gcs.ask(ray.get_actor, name, NAMESPACE)
        self._collector = collector
        return await collector.render.remote()  # type: ignore[no-any-return]
