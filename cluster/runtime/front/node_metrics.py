"""Asks this node's collector for the figures of all its processes, for `/metrics` of the HTTP front."""

import asyncio

import ray

from cluster.errors import Unavailable
from cluster.runtime.names import NAMESPACE, metrics_name

TIMEOUT_S = 10.0


async def scrape_node(group: str) -> bytes:
    """Returns a scrape in Prometheus' text format. Raises Unavailable."""
    name = metrics_name(group, ray.get_runtime_context().get_node_id())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            collector = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
            text: bytes = await collector.render.remote()
            return text
    except (TimeoutError, ValueError, AttributeError, ray.exceptions.RayError) as error:
        raise Unavailable("the collector of this node's metrics does not answer: try again") from error
