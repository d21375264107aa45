"""The process that keeps the responses of all ingresses. It imports no torch and no FastAPI: it is small.

When it is to be replaced, it gives all that it has to a carrier, another actor, and ends itself; the process that Ray
starts in its place takes that back before it answers. Calls that come meanwhile end with the old process, and their
callers ask again (`shared_responses.py`). It does so by itself when Ray drains its node.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

import ray

from cluster.evolving import on_wire
from cluster.metrics import ResponseStoreMetrics, new_registry, report_version
from cluster.runtime.names import NAMESPACE, carrier_name, controller_name
from cluster.runtime.process import shared_actor_options
from cluster.runtime.ray_logs import log_to_ray
from cluster.runtime.ray_private.core import by_name, draining_nodes
from cluster.serving.openai.responses.kept import KeptResponses
from cluster.serving.openai.responses.store import Contents, Page, Progress, Reply, StoredResponse, StoreLimits

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks for the controller
CARRIER_START_S = 30.0  # for a carrier's process to come up
MISSES = 2  # looks without a controller, after which there is no cluster
SHOW_S = 1.0  # between two looks at the metrics
CARRIED_S = 600.0  # after which nobody comes any more for what is carried


@on_wire("cluster.runtime.front.response_store")
class ResponseStoreActor:
    """A `ResponseStore` as an asyncio actor, detached, one for a group. It ends when the group has no controller any
    more."""

    def __init__(self, group: str) -> None:
        log_to_ray()
        self._group, self._process = group, uuid.uuid4().hex
        self._metrics = ResponseStoreMetrics(report_version(new_registry(), "responses"))
        self._kept = KeptResponses(on_evict=self._metrics.evicted)
        self._open = asyncio.Event()  # calls wait while there is none, or no more, to answer them
        self._start: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def attend(self, limits: StoreLimits) -> None:
        """Each ingress's first call. limits: as its configuration has them now."""
        (await self._store()).limits = limits

    async def put(self, stored: StoredResponse) -> str:
        return await (await self._store()).put(stored)

    async def get(self, response_id: str, client: str) -> StoredResponse:
        return await (await self._store()).get(response_id, client)

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        return await (await self._store()).follow(response_id, client, first)

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        return await (await self._store()).cancel(response_id, client)

    async def delete(self, response_id: str, client: str) -> None:
        await (await self._store()).delete(response_id, client)

    async def report(self, news: Sequence[Progress]) -> Reply:
        return await (await self._store()).report(news)

    async def process(self) -> str:
        """Names this process among those that follow one another; answers once it answers all other calls."""
        await self._store()
        return self._process

    async def hand_over(self, carrier: Any) -> None:
        """Gives all to a carrier, and ends this process for Ray to start the next. Calls are no more answered, but when
        the carrier fails: then it raises Ray's error, and the store goes on.
        """
        await self._store()
        self._open.clear()
        try:
            await carrier.clear.remote()
            for part in self._kept.contents():
                await carrier.add.remote(part)
        except BaseException:
            ray.kill(carrier)  # else a later process would take up what it has by then
            self._open.set()
            raise
        log.info("%s: %d kept responses are handed over", self._group, self._kept.usage().num_kept)
        await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor, no_restart=False)

    async def _store(self) -> KeptResponses:
        if self._start is None:  # not in the constructor: no event loop runs there yet
            self._start = asyncio.create_task(self._begin())
        await self._start
        await self._open.wait()
        return self._kept

    async def _begin(self) -> None:
        carrier = await _find(carrier_name(self._group))
        if carrier is not None:
            await self._take(carrier)
        self._tasks = [
            asyncio.create_task(self._until_alone()),
            asyncio.create_task(self._until_drained()),
            asyncio.create_task(self._show()),
        ]
        self._open.set()

    async def _take(self, carrier: Any) -> None:
        """Takes a carrier's parts, and ends it. If it dies, its parts are lost that have not come."""
        try:
            for index in range(await carrier.num_parts.remote()):
                self._kept.take(await carrier.part.remote(index))
            log.info("%s: goes on with %d kept responses", self._group, self._kept.usage().num_kept)
            await asyncio.to_thread(ray.kill, carrier)
        except ray.exceptions.RayError as error:
            log.warning("%s: kept responses are lost with their carrier: %s", self._group, error)

    async def _show(self) -> None:
        while True:
            usage = self._kept.usage()
            self._metrics.state(kept=usage.num_kept, kept_bytes=usage.num_bytes, running=usage.num_running)
            await asyncio.sleep(SHOW_S)

    async def _until_drained(self) -> None:
        """Goes on elsewhere once Ray drains this node. Without a place for a carrier it stays, and answers."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                drains = await asyncio.to_thread(self._drains)
            except ray.exceptions.RayError as error:
                log.warning("%s: Ray does not tell which nodes it drains: %s", self._group, error)
                continue
            if not drains:
                continue
            try:
                carrier = await asyncio.to_thread(carrier_actor, self._group, _custom_resource())
                await _answers(carrier)
                await self.hand_over(carrier)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("%s: the store of responses stays on a node that drains: %r", self._group, error)

    @staticmethod
    def _drains() -> bool:
        return ray.get_runtime_context().get_node_id() in draining_nodes()

    async def _until_alone(self) -> None:
        misses = 0
        while misses < MISSES:
            await asyncio.sleep(LOOK_S)
            found = await _find(controller_name(self._group))
            misses = 0 if found is not None else misses + 1
        log.info("%s: the cluster has ended, and the kept responses with it", self._group)
        ray.actor.exit_actor()


@on_wire("cluster.runtime.front.response_store")
class ResponseCarrier:
    """Has a store's contents while one process of it follows another, and ends by itself if none does."""

    def __init__(self) -> None:
        log_to_ray()
        self._parts: list[Contents] = []
        self._end: asyncio.Task[None] | None = None

    async def clear(self) -> None:
        self._parts.clear()
        if self._end is None:
            self._end = asyncio.create_task(self._end_later())

    async def _end_later(self) -> None:
        await asyncio.sleep(CARRIED_S)
        log.warning("nobody has come for %d parts of a store's contents: they are lost", len(self._parts))
        ray.actor.exit_actor()

    async def add(self, part: Contents) -> None:
        self._parts.append(part)

    async def num_parts(self) -> int:
        return len(self._parts)

    async def part(self, index: int) -> Contents:
        return self._parts[index]


def carrier_actor(group: str, resource: str) -> Any:
    """Makes the group's carrier, or finds it. resource: a custom one, of the nodes where it may be; "" for any."""
    options = shared_actor_options(group, resource) | {"max_restarts": 0}
    return (
        ray.remote(by_name(ResponseCarrier)).options(name=carrier_name(group), namespace=NAMESPACE, **options).remote()
    )


async def _answers(carrier: Any) -> None:
    """Returns once it does. Raises TimeoutError for one that finds no place, which is ended; RayError."""
    try:
        async with asyncio.timeout(CARRIER_START_S):
            await carrier.num_parts.remote()
    except TimeoutError:
        await asyncio.to_thread(ray.kill, carrier)
        raise


def _custom_resource() -> str:
    """The one that this process holds a share of."""
    held = ray.get_runtime_context().get_assigned_resources()
    return next((name for name in held if name not in ("CPU", "GPU", "memory")), "")


async def _find(name: str) -> Any | None:
    try:
        return await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
    except ValueError:
        return None
