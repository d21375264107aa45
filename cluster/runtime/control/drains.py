"""Empties the nodes that Ray drains before they go: each shard there gets a successor on another node.

Made before it is broken: the successor loads while the shard computes, and takes over with a plan that all engines
have. Where no other node has room for a process, its experts go to shards that stay, and come back with room. Serve
does the like for attention replicas and ingresses.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import ray

from cluster.checkpoint.files import in_one_line
from cluster.errors import ClusterError
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.changes import Change, PlacementChanges
from cluster.runtime.control.launcher import Launcher, shard_resources
from cluster.runtime.control.shards import Shard, Shards
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState
from cluster.runtime.control.supervision import ShardSupervision

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at Ray's nodes: a pod may have 30 s from its notice to its end
ROOM_S = 5.0  # for room on another node, after which experts go to shards that stay
FAREWELL_S = 0.5  # for rows that are under way to a shard whose successor all engines know
RETRY_S = 5.0  # after a successor, or experts for a shard without any, that did not load


class Drains:
    """Used by the controller's event loop. home: the node of this process."""

    def __init__(
        self,
        state: ClusterState,
        shards: Shards,
        supervision: ShardSupervision,
        changes: PlacementChanges,
        spares: SpareProcesses,
        *,
        launcher: Launcher,
        metrics: ControllerMetrics,
        home: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._shards, self._supervision, self._changes = state, shards, supervision, changes
        self._spares, self._launcher, self._metrics, self._home, self._clock = spares, launcher, metrics, home, clock
        self._moves: dict[int, asyncio.Task[None]] = {}  # by shard
        self._stranded: set[int] = set()  # shards that find no room
        self._tried: set[int] = set()  # of these, when their experts last were to go without them
        self._resting: dict[int, float] = {}  # until when shards without experts are given none, after it failed
        self._work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            try:
                await self.look()
            except ray.exceptions.RayError as error:
                log.warning("%s: Ray does not tell which nodes it drains: %s", self._state.group, error)
            except Exception:  # later drains hang on the next look
                log.exception("%s: a look at nodes that drain failed", self._state.group)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Begins what is to be done, and waits for none of it. Raises RayError."""
        draining = await self._launcher.in_thread(self._launcher.draining)
        for node_id in draining.keys() - self._state.draining.keys():
            log.info("%s: Ray drains node %s", self._state.group, node_id)
        self._state.note_draining(draining)
        leaving = [shard for shard in self._shards if shard.node_id in draining]
        self._metrics.leaving(len(leaving))
        self._spares.leave(draining.keys())
        for shard in leaving:
            if shard.shard_id not in self._moves:
                self._moves[shard.shard_id] = asyncio.create_task(self._move(shard))
        if self._work is None or self._work.done():
            self._work = self._next_work()
        if self._home in draining and not leaving and not self._changes.busy and await self._has_another_home():
            log.info("%s: the controller leaves node %s", self._state.group, self._home)
            await self._launcher.in_thread(self._launcher.restart, self._launcher.me())

    def leaving(self) -> tuple[tuple[str, float, str], ...]:
        """For the status: the fields of each `LeavingNode`."""
        need = ", ".join(f"{amount:g} {name}" for name, amount in shard_resources(self._state.config).items())
        found = []
        for node_id, until in self._state.draining.items():
            here = {shard.shard_id for shard in self._shards if shard.node_id == node_id}
            stranded = here & self._stranded
            waits = f"no other node has room for {_names(stranded)} ({need} each)" if stranded else ""
            found.append((node_id, until, waits))
        return tuple(found)

    def close(self) -> None:
        """Moves nothing more."""
        for task in (*self._moves.values(), *([self._work] if self._work is not None else [])):
            task.cancel()

    def _leaves(self, shard: Shard) -> bool:
        """Whether it still stands on a node that drains; it may have died, and come up elsewhere."""
        here = shard.shard_id < len(self._shards) and self._shards[shard.shard_id] is shard
        return here and shard.node_id in self._state.draining

    async def _move(self, shard: Shard) -> None:
        try:
            if not await self._give_successor(shard):
                await asyncio.sleep(RETRY_S)
        finally:
            self._moves.pop(shard.shard_id, None)

    async def _give_successor(self, shard: Shard) -> bool:
        """On another node, unless its own goes or its process dies first. False for one that does not load."""
        successor = self._supervision.successor(shard.shard_id)
        change = Change("drain", shard.shard_id)
        try:
            if not await self._find_room(successor, shard):
                return True
            await successor.load(self._state.slice_of(shard.shard_id))
            async with self._changes.alone(f"{change}: its successor takes over"):
                if self._leaves(shard):
                    await self._put(successor, shard)
                    self._metrics.changed(change.kind, "done", 0)
        except (ClusterError, ray.exceptions.RayError) as error:
            cause = in_one_line(repr(getattr(error, "cause", None) or error))
            self._metrics.changed(change.kind, "failed", 0)
            self._state.note(f"{change} failed: its successor did not load ({cause}); the shard stays for now")
            return False
        finally:
            if successor not in self._shards:
                await self._remove(successor)
        return True

    async def _find_room(self, successor: Shard, shard: Shard) -> bool:
        """Starts the successor's process; false when the shard needs none any more."""
        starting, since = asyncio.ensure_future(successor.start(self._supervision.emptiest_node)), self._clock()
        try:
            while not (await asyncio.wait([starting], timeout=LOOK_S))[0]:
                if not self._leaves(shard):
                    return False
                places = await self._launcher.in_thread(self._launcher.places)
                if places.get(successor.status.actor) != "":  # not asked for yet, or there: its process starts
                    since = self._clock()
                    self._stranded.discard(shard.shard_id)
                elif self._clock() - since >= ROOM_S:
                    self._stranded.add(shard.shard_id)
            await starting
        finally:
            starting.cancel()
            self._stranded.discard(shard.shard_id)
        return True

    async def _put(self, successor: Shard, shard: Shard) -> None:
        """Raises RayError where the successor does not load; then all stays as it was."""
        started = self._clock()
        await successor.load(self._state.slice_of(shard.shard_id))  # the plan may have changed meanwhile
        self._supervision.put(successor)
        await self._changes.adopted(self._state.plan.epoch)
        await asyncio.sleep(FAREWELL_S)
        await self._remove(shard)
        log.info("%s: shard %d left its node in %.1f s", self._state.group, shard.shard_id, self._clock() - started)

    async def _remove(self, shard: Shard) -> None:
        """A process that is of no more use. One that is left ends with its node, or when a controller starts."""
        try:
            await self._launcher.in_thread(shard.remove)
        except ray.exceptions.RayError as error:
            log.warning("%s: %s is not taken away: %s", self._state.group, shard.status.actor, error)

    def _next_work(self) -> asyncio.Task[None] | None:
        """A change of the plan that is due: stranded shards give their experts away, once the other moves are made;
        those that have a place again get some."""
        for shard_id in self._changes.vacated:
            shard = self._shards[shard_id]
            if self._clock() < self._resting.get(shard_id, 0.0):
                continue
            if shard.handle is not None and shard.node_id not in self._state.draining:
                return asyncio.create_task(self._spread(shard_id))
        self._tried &= self._stranded
        new = self._stranded - self._tried
        if not new or self._stranded != self._moves.keys():
            return None
        self._tried |= new
        self._state.note(f"Ray drains a node, and no other one has room for {_names(new)}")
        if self._stranded <= self._changes.vacated or len(self._stranded) == len(self._shards):
            return None
        return asyncio.create_task(self._changes.guard(self._changes.vacate(frozenset(self._stranded))))

    async def _spread(self, shard_id: int) -> None:
        await self._changes.guard(self._changes.spread(shard_id))
        self._resting[shard_id] = self._clock() + RETRY_S  # counts for one that is still without experts

    async def _has_another_home(self) -> bool:
        resource = self._state.config.ingress_resource
        nodes = await self._launcher.in_thread(self._launcher.nodes)
        return any(
            node.node_id not in self._state.draining and (not resource or node.resources.get(resource, 0))
            for node in nodes
        )


def _names(shard_ids: Collection[int]) -> str:
    return f"shard{'s' * (len(shard_ids) > 1)} {', '.join(map(str, sorted(shard_ids)))}"
