"""Keeps the shards alive: each has a task that starts its process, loads its slice, and does so again when it dies."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable

import ray

from cluster.checkpoint.files import in_one_line
from cluster.errors import SetupError
from cluster.runtime.control.shard_process import ShardProcess, Slice
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState, this_actor
from cluster.runtime.last_words import last_words
from cluster.runtime.process import share_of

log = logging.getLogger(__name__)

RESPAWN_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before the n-th respawn in a row; the last one repeats
MAX_FIRST_STARTS = 5  # of a shard of a cluster that never served: what kept it from loading so often will not pass
STABLE_S = 2.0  # a shard that was up for so long starts again at the first backoff: no row that it was sent kills it


class ShardSupervision:
    """found: actors of shards that an earlier controller left, by shard."""

    def __init__(self, state: ClusterState, spares: SpareProcesses) -> None:
        self.state = state
        self.spares = spares
        self.found: dict[int, str] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def add(self, shard_id: int) -> ShardProcess:
        """A shard more, and its supervision; its actor may run already."""
        shard = self.state.shards[shard_id] = ShardProcess(self.state.group, shard_id, self.state.config)
        shard.status.actor = self.found.pop(shard_id, shard.name)
        self.state.metrics.expected(shard_id)
        self._tasks[shard_id] = asyncio.create_task(self._guard(self._supervise(shard)))
        return shard

    def remove_last(self) -> None:
        """The shard with the highest id, which the plan has nothing for any more."""
        last = len(self.state.shards) - 1
        self._tasks.pop(last).cancel()
        self.state.shards.pop(last).remove()

    async def _guard(self, work: Awaitable[None]) -> None:
        """Turns what ends the work into the controller's failure, which callers then see."""
        try:
            await work
        except SetupError as error:
            await self.state.fail(error)
        except Exception as error:
            log.exception("%s: the supervision ended", self.state.group)
            await self.state.fail(SetupError(f"the expert controller failed: {error!r}"))

    async def _supervise(self, shard: ShardProcess) -> None:
        """Keeps one shard alive until cancelled. Raises SetupError when it cannot load."""
        failures = first_starts = 0
        while True:
            up_since = time.monotonic()
            try:
                await self._bring_up(shard)
                up_since = time.monotonic()
                why = await shard.lost()
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SetupError):
                    raise error.cause from None
                why = f"failed: {in_one_line(repr(error.cause))}"
            except ray.exceptions.RayActorError as error:
                why = f"died: {words}" if (words := last_words(str(error))) else "died"
            first_starts += 1
            if first_starts >= MAX_FIRST_STARTS and not self.state.published:
                raise SetupError(
                    f"shard {shard.shard_id} did not load in {first_starts} attempts, the last one {why}: if it is "
                    "memory, use more expert shards, on more machines, or a smaller dtype"
                )
            failures = 0 if time.monotonic() - up_since > STABLE_S else failures
            log.warning("%s: shard %d %s (%s)", self.state.group, shard.shard_id, why, shard.status.process)
            if not shard.leaves:
                self.state.note(f"shard {shard.shard_id} {why}")
                self.state.metrics.respawned(shard.shard_id)
            was_up = shard.handle is not None
            shard.down()
            if was_up:
                async with self.state.news:
                    assert self.state.plan is not None
                    self.state.publish(self.state.plan)
            await asyncio.sleep(RESPAWN_BACKOFF_S[min(failures, len(RESPAWN_BACKOFF_S) - 1)])
            failures += 1

    async def _bring_up(self, shard: ShardProcess) -> None:
        """Finds or makes a shard's actor, loads its slice, publishes it."""
        await shard.start(self._emptiest_node(), self.spares)
        loaded: Slice | None = None
        while loaded != (wanted := self.state.slice_of(shard.shard_id)):  # the plan may change while it loads
            await shard.load(wanted, this_actor())
            loaded = wanted
        async with self.state.news:
            shard.up()
            assert self.state.plan is not None
            if self.state.published or self.state.all_up():
                self.state.publish(self.state.plan)
        self.state.look.set()
        log.info("%s: shard %d is up (%s)", self.state.group, shard.shard_id, shard.status.process)

    def _emptiest_node(self) -> str | None:
        """The node with the fewest shards, of those that are large enough for one."""
        held = Counter(shard.node_id for shard in self.state.shards.values())
        need = {"CPU": self.state.config.cpus_per_expert_shard, "GPU": self.state.config.gpus_per_expert_shard or 0}
        need |= share_of(self.state.config.expert_resource)
        fits = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in need.items())
        ]
        return min(fits, key=lambda node_id: (held[node_id], node_id), default=None)

    def close(self) -> None:
        """Ends the supervision; the shards live on."""
        for task in self._tasks.values():
            task.cancel()
