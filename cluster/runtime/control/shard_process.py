"""One expert shard as the controller handles it: its place in the cluster, and the actor that lives there.

The actor dies and comes again; the place stays reserved until the shard is removed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from cluster.config.lora import AdapterList
from cluster.config.quantization import PLAIN
from cluster.errors import ClusterError, Unavailable
from cluster.experts.pulse import Sign
from cluster.runtime.control.launcher import Launcher
from cluster.runtime.control.shards import Configured
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.names import other_shard_name, shard_of
from cluster.runtime.workers.protocol import Slice
from cluster.status import ProcessInfo, ShardStatus

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0  # between two looks at a shard
FIND_S = 3.0  # in which Ray's GCS, unless it is away, finds an actor; it takes milliseconds


class ShardProcess:
    """A `Shard`. name: of its place, and of its actor unless that was a spare process."""

    def __init__(
        self, group: str, name: str, *, configured: Configured, launcher: Launcher, spares: SpareProcesses
    ) -> None:
        self._group, self.name = group, name
        shard_id = shard_of(group, name)
        self.status = ShardStatus(shard_id=shard_id, actor=self.name)
        self.handle: Any | None = None
        self.leaves = False
        self._configured, self._launcher, self._spares = configured, launcher, spares
        self._actor: Any | None = None
        self._former: Any | None = None
        self._wanted_node = ""
        self._adapted = AdapterList()

    @property
    def shard_id(self) -> int:
        return self.status.shard_id

    @property
    def node_id(self) -> str:
        return self.status.node_id or self._wanted_node

    async def start(self, best_node: Callable[[], Awaitable[str | None]]) -> None:
        launcher = self._launcher
        try:
            async with asyncio.timeout(FIND_S):
                self._actor = await launcher.in_thread(launcher.find, self.status.actor)
        except TimeoutError:
            if not await self._follow_without_gcs():
                self._actor = await launcher.in_thread(launcher.find, self.status.actor)
        if self._actor is None:
            config, node_id = self._configured.config, await best_node()
            self._wanted_node, self.status.process = node_id or "", None
            place = await launcher.reserve(self.name, node_id, config)
            if place.node_id in self._configured.draining:  # nothing starts there any more
                await launcher.in_thread(launcher.give_back, self.name)
                self.name = self.status.actor = other_shard_name(self._group, self.shard_id)
                place = await launcher.reserve(self.name, node_id, config)
            if not await self._take_spare(place.node_id):
                self._actor = await launcher.in_thread(launcher.start_shard, self.name, self.shard_id, place, config)
        self.status.state, self._adapted = "loading", AdapterList()

    async def _take_spare(self, node_id: str) -> bool:
        spare = await self._spares.take(node_id, self.shard_id)
        if spare is not None:
            self.status.actor, self._actor = spare
        return spare is not None

    async def _follow_without_gcs(self) -> bool:
        """Takes the spare process of the node where the shard was: its place there is reserved. A shard that lived,
        cut off from this process, ends when Ray's GCS is back."""
        if not await self._take_spare(self.status.node_id):
            return False
        log.warning("%s: Ray's GCS is away, the spare process %s follows", self.name, self.status.actor)
        if self._former is not None:
            self._launcher.end(self._former)
        return True

    async def load(self, experts: Slice) -> None:
        assert self._actor is not None
        wanted = {layer_id: tuple(ids) for layer_id, ids in experts.items()}
        if await self._actor.held.remote() != wanted or not wanted:
            config = self._configured.config
            controller = self._launcher.me()
            # An older shard's `load` does not have it.
            rounded = {} if config.of_experts == PLAIN else {"quantization": config.of_experts}
            await self._actor.load.remote(config.model, wanted, config.dtype, config.device, controller, **rounded)
        self.status.process = await self._actor.process.remote()
        await self._adapt()

    async def _adapt(self) -> None:
        """Gives it the adapters. It comes up without those that it cannot read: their rows alone wait then."""
        while self._adapted != (wanted := self._configured.adapters):  # they may change meanwhile
            if wanted.adapters or self._adapted.adapters:
                try:
                    await give_shard(self.status.shard_id, self._actor, wanted)
                except ClusterError as error:
                    log.error("%s comes up without its part of the adapters: %s", self.name, error)
            self._adapted = wanted

    def up(self) -> None:
        self.handle = self._actor
        self.status.state = "up"

    async def lost(self) -> str:
        assert self._actor is not None
        actor = self._actor
        asks = actor.sign if hasattr(actor, "sign") else actor.process  # an older version has no `sign`
        death = asyncio.ensure_future(_as_future(actor.hold.remote()))
        try:
            while True:
                done, _ = await asyncio.wait([death], timeout=HEARTBEAT_S)
                if done:
                    return "died"
                limit_s = self._configured.config.shard_timeout_s
                try:
                    async with asyncio.timeout(limit_s):
                        sign = await asks.remote()
                except TimeoutError:
                    await self._kill_hung()
                    return f"did not answer for {limit_s:g} s and was killed"
                except ray.exceptions.RayActorError:
                    return "died"
                if isinstance(sign, Sign) and sign.stuck_s >= limit_s:
                    await self._kill_hung()
                    return f"did not get on with its work for {sign.stuck_s:.0f} s and was killed"
        finally:
            death.cancel()

    def down(self) -> None:
        self.handle, self._actor, self._former = None, None, self._actor
        self.status.actor = self.name
        self.status.state, self.status.loaded_bytes = "lost", 0
        self.status.respawns += not self.leaves
        self.leaves = False

    def retire(self) -> None:
        self.leaves = True
        self._launcher.end(self.handle)

    def remove(self) -> None:
        actor = self._launcher.find(self.status.actor)
        if actor is not None:
            self._launcher.end(actor)
        self._launcher.give_back(self.name)

    async def _kill_hung(self) -> None:
        process: ProcessInfo | None = self.status.process
        if process is not None:
            try:
                async with asyncio.timeout(self._configured.config.shard_timeout_s):
                    await self._launcher.kill(process)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("%s hangs and could not be killed: %r", self.name, error)
        self._launcher.end(self._actor)


async def give_shard(shard_id: int, actor: Any, wanted: AdapterList) -> None:
    """Raises ClusterError; RayActorError where the shard dies."""
    if not (await actor.process.remote()).takes_adapters:
        raise Unavailable(f"shard {shard_id} is of an older version: `moe-cluster roll` gives it a new process")
    try:
        await actor.adapt.remote(wanted)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClusterError):
            raise error.cause from None
        raise Unavailable(f"shard {shard_id} failed: {error.cause!r}") from error


async def _as_future(ref: Any) -> Any:
    return await ref
