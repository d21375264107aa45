"""Keeps the shards alive: each has a task that starts its process, loads its slice, and does so again when it dies."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import ray

from cluster.checkpoint.files import in_one_line
from cluster.errors import SetupError
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.launcher import Launcher, shard_resources
from cluster.runtime.control.recall import Left
from cluster.runtime.control.shards import Shard, Shards
from cluster.runtime.control.state import ClusterState
from cluster.runtime.last_words import last_words
from cluster.runtime.names import other_shard_name, shard_name
from cluster.runtime.workers.protocol import Slice

log = logging.getLogger(__name__)

RESPAWN_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before the n-th respawn in a row; the last one repeats
MAX_FIRST_STARTS = 5  # of a shard of a cluster that never served: what kept it from loading so often will not pass
STABLE_S = 2.0  # a shard that was up for so long starts again at the first backoff: no row that it was sent kills it


class ShardSupervision:
    """Adds shards to a cluster and removes them; publishes the plan when one comes or goes."""

    def __init__(
        self,
        state: ClusterState,
        shards: Shards,
        metrics: ControllerMetrics,
        *,
        make_shard: Callable[[str], Shard],
        launcher: Launcher,
        on_up: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """make_shard: from its name.  on_up: called when a shard has come up."""
        self._state, self._shards, self._metrics = state, shards, metrics
        self._make_shard, self._launcher, self._on_up, self._clock = make_shard, launcher, on_up, clock
        self._found: dict[int, Left] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def take_over(self, left: Mapping[int, Left]) -> None:
        """From an earlier controller, by shard."""
        self._found = dict(left)

    def add(self) -> Shard:
        """A shard more, and its supervision; its actor may run already."""
        shard = self._taken_over(len(self._shards))
        self._shards.add(shard)
        self._metrics.expected(shard.shard_id)
        self._tasks.append(asyncio.create_task(self._guard(self._supervise(shard))))
        return shard

    async def remove_last(self) -> None:
        """The shard with the highest id, which the plan has nothing for any more."""
        self._tasks.pop().cancel()
        await self._launcher.in_thread(self._shards.pop().remove)

    def successor(self, shard_id: int) -> Shard:
        """One that shall take a shard's place, and starts while that still runs."""
        return self._make_shard(other_shard_name(self._state.group, shard_id))

    def put(self, shard: Shard) -> None:
        """A successor that has loaded: it takes the place of the shard of its id, which nobody looks after any more."""
        shard.status.respawns = self._shards[shard.shard_id].status.respawns
        self._tasks[shard.shard_id].cancel()
        shard.up()
        self._shards.put(shard)
        self._tasks[shard.shard_id] = asyncio.create_task(self._guard(self._supervise(shard)))
        self._publish_up()

    def close(self) -> None:
        """Ends the supervision, and all shards."""
        for task in self._tasks:
            task.cancel()
        for shard in (*self._shards, *map(self._taken_over, list(self._found))):
            shard.remove()

    def _taken_over(self, shard_id: int) -> Shard:
        """Made from what an earlier controller left of it, if anything."""
        left = self._found.pop(shard_id, Left())
        shard = self._make_shard(left.place or shard_name(self._state.group, shard_id))
        shard.status.actor = left.actor or shard.status.actor
        return shard

    async def _guard(self, work: Awaitable[None]) -> None:
        """Turns what ends the work into the controller's failure, which callers then see."""
        try:
            await work
        except SetupError as error:
            self._state.fail(error)
        except Exception as error:
            log.exception("%s: the supervision ended", self._state.group)
            self._state.fail(SetupError(f"the expert controller failed: {error!r}"))

    async def _supervise(self, shard: Shard) -> None:
        """Keeps one shard alive until cancelled. Raises SetupError when it cannot load."""
        failures = first_starts = 0
        while True:
            up_since = self._clock()
            try:
                if shard.handle is None:
                    await self._bring_up(shard)
                up_since = self._clock()
                why = await shard.lost()
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SetupError):
                    raise error.cause from None
                why = f"failed: {in_one_line(repr(error.cause))}"
            except ray.exceptions.RayActorError as error:
                why = f"died: {words}" if (words := last_words(str(error))) else "died"
            first_starts += 1
            if first_starts >= MAX_FIRST_STARTS and not self._state.published:
                raise SetupError(
                    f"shard {shard.shard_id} did not load in {first_starts} attempts, the last one {why}: if it is "
                    "memory, use more expert shards, on more machines, or a smaller dtype"
                )
            failures = 0 if self._clock() - up_since > STABLE_S else failures
            self._take_down(shard, why)
            await asyncio.sleep(RESPAWN_BACKOFF_S[min(failures, len(RESPAWN_BACKOFF_S) - 1)])
            failures += 1

    def _take_down(self, shard: Shard, why: str) -> None:
        log.warning("%s: shard %d %s (%s)", self._state.group, shard.shard_id, why, shard.status.process)
        if not shard.leaves:
            self._state.note(f"shard {shard.shard_id} {why}")
            self._metrics.respawned(shard.shard_id)
        was_up = shard.handle is not None
        shard.down()
        if was_up:
            self._state.publish()

    async def _bring_up(self, shard: Shard) -> None:
        """Finds or makes a shard's actor, loads its slice, publishes it."""
        await shard.start(self.emptiest_node)
        loaded: Slice | None = None
        while loaded != (wanted := self._state.slice_of(shard.shard_id)):  # the plan may change while it loads
            await shard.load(wanted)
            loaded = wanted
        shard.up()
        self._publish_up()
        log.info("%s: shard %d is up (%s)", self._state.group, shard.shard_id, shard.status.process)

    def _publish_up(self) -> None:
        """A shard has come up."""
        if self._state.published or self._shards.all_up():
            self._state.publish()
        self._on_up()

    async def emptiest_node(self) -> str | None:
        """The node with the fewest shards, of those that stay and are large enough for one."""
        nodes = await self._launcher.in_thread(self._launcher.nodes)
        num_shards = Counter(shard.node_id for shard in self._shards)  # now: several may ask at once
        need = shard_resources(self._state.config)
        fits = [
            node.node_id
            for node in nodes
            if node.node_id not in self._state.draining
            and all(node.resources.get(name, 0) >= amount for name, amount in need.items())
        ]
        return min(fits, key=lambda node_id: (num_shards[node_id], node_id), default=None)
