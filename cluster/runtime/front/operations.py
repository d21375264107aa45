"""Changes of the cluster that an ingress makes for an administrator: by the controller, and by Ray."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from cluster.errors import ClusterError, InvalidRequest, NotFound, SetupError, Unavailable
from cluster.runtime.names import APPLICATION, ATTENTION_REPLICA, NAMESPACE
from cluster.runtime.ray_private.serve import ask_for_replicas
from cluster.status import ClusterStatus

log = logging.getLogger(__name__)


class RayOperations:
    """As `Operations`. status: as the ingress last read it, None before the first time.  look: reads it again."""

    def __init__(
        self, controller: Any, status: Callable[[], ClusterStatus | None], look: Callable[[], Awaitable[None]]
    ) -> None:
        self._controller, self._status, self._look = controller, status, look

    async def kill_shard(self, shard_id: int) -> str:
        status = self._status()
        shards = {shard.shard_id: shard for shard in status.shards} if status is not None else {}
        if shard_id not in shards:
            raise InvalidRequest(f"there is no shard {shard_id}: there are {len(shards)}, from 0", "shard_id")
        try:
            actor = await asyncio.to_thread(ray.get_actor, shards[shard_id].actor, NAMESPACE)
        except ValueError:
            raise Unavailable(f"shard {shard_id} has no process now: it is being replaced") from None
        await asyncio.to_thread(ray.kill, actor)
        return f"shard {shard_id} is killed"

    async def rebalance(self) -> str:
        return await _answer(self._controller.rebalance.remote(), "the expert controller")

    async def scale_experts(self, num_shards: int) -> str:
        return await _answer(self._controller.scale.remote(num_shards), "the expert controller")

    async def scale_attention(self, num_replicas: int) -> str:
        asked = await asyncio.to_thread(ask_for_replicas, ATTENTION_REPLICA, APPLICATION, num_replicas)
        await _answer(asked, "Ray Serve")
        return f"{num_replicas} attention replicas are asked for"

    async def load_adapter(self, name: str, directory: str, *, in_place: bool) -> str:
        done = await _answer(self._controller.load_adapter.remote(name, directory, in_place), "the expert controller")
        await self._look()
        return done

    async def unload_adapter(self, name: str) -> str:
        done = await _answer(self._controller.unload_adapter.remote(name), "the expert controller")
        await self._look()
        return done

    async def note(self, what: str) -> None:
        try:
            await self._controller.note_fault.remote(what)
        except (AttributeError, ray.exceptions.RayError) as error:  # it is of an older version, or is gone
            log.warning("not shown to watchers: %s (%s)", what, error)


async def _answer(asked: Any, whom: str) -> str:
    """Raises InvalidRequest for a change that cannot be, Unavailable for one that failed."""
    try:
        return str(await asked)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if isinstance(cause, NotFound):
            raise NotFound(reason, cause.field) from None
        if isinstance(cause, (SetupError, InvalidRequest)):
            raise InvalidRequest(reason, "request") from None
        if isinstance(cause, ClusterError):
            raise Unavailable(reason) from None
        raise InvalidRequest(f"{whom} refuses it: {reason}", "request") from None
    except ray.exceptions.RayError as error:
        raise Unavailable(f"{whom} is being restarted: try again in a few seconds") from error
