"""Changes of placement: where experts move, and shards come and go, while requests stream.

One after another, and made before they are broken: load on the new shard, publish the plan, wait for its readers,
unload on the old one.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import ray

from cluster.checkpoint.files import in_one_line
from cluster.errors import ClusterError, SetupError
from cluster.experts import eplb
from cluster.experts.load_meter import Loads
from cluster.experts.placement import PlacementPlan, swapped
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.capacity import capacities, padded, union
from cluster.runtime.control.engines import Engines
from cluster.runtime.control.expert_facts import ExpertFacts
from cluster.runtime.control.shards import Shards
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState
from cluster.runtime.control.supervision import ShardSupervision

log = logging.getLogger(__name__)

ADOPTION_TIMEOUT_S = 5.0  # for engines to have a new plan; a later one is refused by the shard and sends its rows again
GROW_TIMEOUT_S = 600.0  # for a new shard's process: a cluster that grows itself takes minutes for a node
MIN_GAIN = 0.05  # of a layer's slowest shard; less is not worth a move


@dataclass(frozen=True, slots=True)
class Change:
    """Why experts move. kind: as in the metrics."""

    kind: Literal["rebalance", "settle", "add", "remove", "shuffle", "drain"]
    shard_id: int | None = None

    def __str__(self) -> str:
        return self.kind if self.shard_id is None else f"{self.kind} shard {self.shard_id}"


class PlacementChanges:
    """work: the change under way, "" for none.  vacated: shards that gave their experts away, since their node leaves
    and no other one had room for them."""

    def __init__(
        self,
        state: ClusterState,
        shards: Shards,
        supervision: ShardSupervision,
        spares: SpareProcesses,
        engines: Engines,
        *,
        facts: ExpertFacts,
        rates: Callable[[], Loads],
        metrics: ControllerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rates: of the experts, as measured now."""
        self.work = ""
        slices = () if state.known_plan is None else state.known_plan.slices
        self.vacated = {i for i, experts in enumerate(slices) if not any(experts.values())}
        self._state, self._shards, self._supervision, self._spares = state, shards, supervision, spares
        self._engines, self._facts, self._rates, self._metrics = engines, facts, rates, metrics
        self._clock = clock
        self._changing = asyncio.Lock()

    @property
    def busy(self) -> bool:
        return self._changing.locked()

    async def scale(self, num_shards: int) -> str:
        """Adds or removes shards one at a time; returns what was done. Raises SetupError for what cannot be."""
        self._check_experts()
        num_experts = self._facts.num_experts
        if not 1 <= num_shards <= num_experts:
            raise SetupError(
                f"{num_shards} expert shards for {num_experts} experts a layer: ask for 1 to {num_experts}"
            )
        if self._state.failure is not None:
            raise self._state.failure
        self._state.aim(num_shards)
        return await self.settle()

    async def rebalance(self) -> str:
        """Follows the measured load; returns what was done. Raises SetupError."""
        self._check_experts()
        async with self._changing:
            return await self._balance(Change("rebalance"))

    async def shuffle(self, num_swaps: int, seed: int) -> str:
        """Swaps experts between shards for the sake of it: a rehearsal of moves. Raises ClusterError."""
        self._check_experts()
        async with self._changing:
            await self._move(swapped(self._state.plan, num_swaps, seed), Change("shuffle"))
        return f"{num_swaps} pairs of experts changed places"

    async def roll(self) -> str:
        """Replaces each shard's process by a new one, for instance of another version of this package, one at a time:
        a fresh spare process waits beside each that ends. Raises SetupError."""
        async with self._changing:
            await self._state.until(self._shards.all_up)
            await self._spares.clear()
            rolled = 0
            for shard in self._shards:
                if shard.node_id in self._state.draining:
                    continue  # its drain gives it a new process, on another node
                with self._working(f"roll: shard {shard.shard_id} of {len(self._shards)}"):
                    await self._spares.keep([shard.node_id])
                    await self._spares.started(shard.node_id)
                    old = shard.handle
                    shard.retire()
                    await self._state.until(lambda shard=shard, old=old: shard.handle not in (None, old))  # type: ignore[misc]
                    rolled += 1
        others = len(self._shards) - rolled
        return f"{rolled} shards have new processes" + f", {others} more get theirs by leaving a node" * bool(others)

    async def settle(self) -> str:
        """Adds or removes shards until there are as many as wanted, and experts where they should be."""
        async with self._changing:
            before = len(self._shards)
            while len(self._shards) != self._state.target and self._state.failure is None:
                await (self._grow() if len(self._shards) < self._state.target else self._shrink())
            self._metrics.shards(len(self._shards.handles()), self._state.target)
            if not self._facts.num_experts:
                return "settle: a dense model has no experts to move"
            if before == len(self._shards):
                return await self._balance(Change("settle"))
            return f"{before} -> {len(self._shards)} expert shards"

    @asynccontextmanager
    async def alone(self, work: str) -> AsyncIterator[None]:
        """No change begins while this one, of another hand, goes on."""
        async with self._changing:
            with self._working(work):
                yield

    async def vacate(self, shard_ids: Set[int]) -> str:
        """Has the other shards hold the experts of these, which get none from now on until `spread`. Raises SetupError
        where they have no room for them, ClusterError where one does not load."""
        change = Change("drain")
        async with self._changing:
            await self._move(await self._plan_without(shard_ids, change), change)
            self.vacated |= shard_ids
        return f"{change}: shards {sorted(shard_ids)} hold no experts any more"

    async def spread(self, shard_id: int) -> str:
        """Gives experts to a shard again that had given them away. Raises ClusterError; it then stays without."""
        async with self._changing:
            text = await self._balance(Change("drain", shard_id), spread=True)
            self.vacated.discard(shard_id)
            return text

    async def guard(self, change: Awaitable[str]) -> None:
        """For changes that nobody waits for: their failure is a fault to be seen, the cluster serves on."""
        try:
            log.info("%s: %s", self._state.group, await change)
        except ClusterError as error:
            reason = str(getattr(error, "cause", None) or error)  # an actor's comes with its traceback
            log.error("%s: %s", self._state.group, reason)
            self._state.note(reason)

    def _check_experts(self) -> None:
        if not self._facts.num_experts:
            raise SetupError("this model is dense: it has no expert shards, attention replicas alone serve it")

    @contextmanager
    def _working(self, work: str) -> Iterator[None]:
        self.work = work
        try:
            yield
        finally:
            self.work = ""

    async def _grow(self) -> None:
        shard = self._supervision.add()
        change = Change("add", shard.shard_id)
        with self._working(f"adding shard {shard.shard_id}: waiting for its process"):
            try:
                async with asyncio.timeout(GROW_TIMEOUT_S):
                    await self._state.until(lambda: shard.handle is not None)
            except TimeoutError:
                await self._supervision.remove_last()
                self._state.aim(shard.shard_id)
                self._metrics.changed(change.kind, "failed", 0)
                config = self._state.config
                raise SetupError(
                    f"a process for shard {shard.shard_id} was not there after {GROW_TIMEOUT_S:g} s: the Ray cluster "
                    f"has no room for {config.cpus_per_expert_shard:g} CPUs and {config.gpus_per_expert_shard or 0:g} "
                    "GPUs more"
                ) from None
            await self._balance(change, spread=True)

    async def _shrink(self) -> None:
        last = len(self._shards) - 1
        change = Change("remove", last)
        with self._working(f"removing shard {last}"):
            try:
                plan = await self._plan_without({last}, change)
                await self._move(replace(plan, slices=plan.slices[:last]), change)
            except ClusterError:
                self._state.aim(last + 1)  # it stays: the others have no room, or did not load
                raise
            await self._supervision.remove_last()
            self.vacated.discard(last)
            self._state.publish()

    async def _plan_without(self, leaving: Set[int], change: Change) -> PlacementPlan:
        """The plan in which the other shards have the experts of these too. Raises SetupError."""
        try:
            return await asyncio.to_thread(
                eplb.rebalance,
                padded(self._state.plan, len(self._shards)),
                self._traffic(),
                shards=self._rooms(leaving),
                min_copies=self._state.config.min_copies,
            )
        except SetupError:
            self._metrics.changed(change.kind, "failed", 0)
            raise

    def _rooms(self, leaving: Set[int] = frozenset(), *, back: int | None = None) -> list[int]:
        """For how many experts each shard has room: none in those that leave or gave theirs away, but in one of these
        that is back."""
        stay = [shard.shard_id not in leaving | (self.vacated - {back}) for shard in self._shards]
        if not any(stay):
            raise SetupError("no expert shard stays that could take the others' experts")
        [room, *_] = capacities(self._state.config, self._facts, sum(stay))
        return [room * stays for stays in stay]

    async def _balance(self, change: Change, *, spread: bool = False) -> str:
        """Moves experts to where the load asks for. spread: also to a shard that has none, whatever was measured."""
        num_shards, traffic = len(self._shards), self._traffic()
        before = padded(self._state.plan, num_shards)
        plan = await asyncio.to_thread(  # 0.5 s for 28 layers of 64 experts on 16 shards
            eplb.rebalance,
            before,
            traffic,
            shards=self._rooms(back=change.shard_id),
            min_copies=self._state.config.min_copies,
            max_moves=None if spread else self._state.config.rebalance_max_moves,
            min_gain=MIN_GAIN,
        )
        was, now = (eplb.imbalance(p, traffic, num_shards=num_shards) for p in (before, plan))
        num_moves = len(eplb.moves(before, plan).added)
        if plan is not before:
            await self._move(plan, change)
        text = f"{change}: {num_moves} experts moved, imbalance {was:.2f} -> {now:.2f}"
        log.info("%s: %s", self._state.group, text)
        return text

    async def _move(self, plan: PlacementPlan, change: Change) -> None:
        """Make before break. Raises ClusterError when a shard fails meanwhile; the old plan then stays."""
        num_shards = len(self._shards)
        old, new = padded(self._state.plan, num_shards), padded(plan, num_shards)
        changed = [i for i in range(num_shards) if old.slices[i] != new.slices[i]]
        await self._state.until(self._shards.all_up)
        started, num_moves = self._clock(), len(eplb.moves(old, new).added)
        try:
            with self._working(f"{change}"):
                for n, shard_id in enumerate(changed):
                    self.work = f"{change}: loading on shard {shard_id} ({n + 1} of {len(changed)})"
                    await self._shards[shard_id].load(union(old.slices[shard_id], new.slices[shard_id]))
                self._state.publish(plan)
                await self.adopted(self._state.plan.epoch)
        except ray.exceptions.RayError as error:
            self._metrics.changed(change.kind, "failed", 0)
            cause = getattr(error, "cause", None) or error
            text = f"{change} failed: a shard did not load ({in_one_line(repr(cause))}); the old plan stays"
            self._state.note(text)
            raise ClusterError(text) from error
        finally:
            await self._trim(changed)
        self._metrics.changed(change.kind, "done", num_moves)
        log.info("%s: %s moved %d experts in %.1f s", self._state.group, change, num_moves, self._clock() - started)

    async def adopted(self, epoch: int) -> None:
        """Waits for the engines to have that plan, though not for long."""
        if not await self._engines.adopted(epoch, ADOPTION_TIMEOUT_S):
            log.warning("%s: not every engine has plan epoch %d yet", self._state.group, epoch)

    async def _trim(self, shard_ids: Sequence[int]) -> None:
        """Lets shards forget what the plan no longer gives them."""
        for shard_id in shard_ids:
            try:
                await self._shards[shard_id].load(self._state.slice_of(shard_id))
            except (ray.exceptions.RayError, AssertionError) as error:
                log.info("%s: shard %d is not there to be trimmed: %r", self._state.group, shard_id, error)

    def _traffic(self) -> Loads:
        """The measured load, and a little for each expert, so that idle ones spread too. Placement follows it."""
        rates = self._rates()
        return rates + max(float(rates.mean()), 1.0) * 0.01
