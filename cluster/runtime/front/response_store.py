"""The process that keeps the responses of all ingresses. It imports no torch and no FastAPI: it is small."""

import asyncio
import logging

import ray

from cluster.evolving import on_wire
from cluster.runtime.names import NAMESPACE, controller_name
from cluster.runtime.ray_logs import log_to_ray
from cluster.serving.openai.responses.store import KeptResponses, StoreLimits

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks for the controller
MISSES = 2  # looks without a controller, after which there is no cluster


@on_wire("cluster.runtime.front.response_store")
class ResponseStoreActor(KeptResponses):
    """An asyncio actor, detached, one for a group. It ends when the group has no controller any more."""

    def __init__(self, group: str) -> None:
        log_to_ray()
        super().__init__()
        self._group = group
        self._watch: asyncio.Task[None] | None = None

    async def attend(self, limits: StoreLimits) -> None:
        """Each ingress's first call. limits: as its configuration has them now."""
        self.limits = limits
        if self._watch is None:  # not in the constructor: no event loop runs there yet
            self._watch = asyncio.create_task(self._until_alone())

    async def _until_alone(self) -> None:
        misses = 0
        while misses < MISSES:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(ray.get_actor, controller_name(self._group), NAMESPACE)
                misses = 0
            except ValueError:
                misses += 1
        log.info("%s: the cluster has ended, and the kept responses with it", self._group)
        ray.actor.exit_actor()
