"""Changes of placement: where experts move, and shards come and go, while requests stream.

One after another, and made before they are broken: load on the new shard, publish the plan, wait for its readers,
unload on the old one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

import ray

from cluster.errors import ClusterError, SetupError
from cluster.experts import eplb
from cluster.experts.placement import PlacementPlan, plan_evenly, swapped
from cluster.runtime.control.shard_process import Slice
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState, this_actor
from cluster.runtime.control.supervision import ShardSupervision
from cluster.runtime.workers.protocol import REPLICA_SILENCE_S

log = logging.getLogger(__name__)

ADOPTION_TIMEOUT_S = 5.0  # for engines to have a new plan; who comes later is refused by the shard and sends again
GROW_TIMEOUT_S = 600.0  # for a new shard's process: a cluster that grows itself takes minutes for a node
MIN_GAIN = 0.05  # of a layer's slowest shard; less is not worth a move


class PlacementChanges:
    """changing: held while one is under way."""

    def __init__(self, state: ClusterState, supervision: ShardSupervision, spares: SpareProcesses) -> None:
        self._state = state
        self._supervision = supervision
        self._spares = spares
        self.changing = asyncio.Lock()

    def first_plan(self) -> PlacementPlan:
        """Even slices; copies where the configuration asks for them."""
        plan = plan_evenly(self._state.sparse_layers, self._state.num_experts, self._state.target, epoch=0)
        if plan.num_shards and (self._state.config.min_copies > 1 or self._state.config.redundant_experts):
            even = [[1.0] * self._state.num_experts for _ in self._state.sparse_layers]
            plan = eplb.rebalance(
                plan, even, shards=self._capacities(self._state.target), min_copies=self._state.config.min_copies
            )
        return replace(plan, epoch=0)

    async def scale(self, num_shards: int) -> str:
        """Adds or removes shards one at a time; returns what was done. Raises SetupError for what cannot be."""
        self._check_target(num_shards)
        self._state.target = num_shards
        self._state.remember()
        return await self.settle()

    async def rebalance(self) -> str:
        """Follows the measured load; returns what was done. Raises SetupError."""
        self._check_experts()
        async with self.changing:
            return await self._balance("rebalance")

    async def shuffle(self, num_swaps: int, seed: int) -> str:
        """Swaps experts between shards for the sake of it: a rehearsal of moves. Raises ClusterError."""
        self._check_experts()
        async with self.changing:
            assert self._state.plan is not None
            await self._move(swapped(self._state.plan, num_swaps, seed), "shuffle")
        return f"{num_swaps} pairs of experts changed places"

    async def roll(self) -> str:
        """Replaces each shard's process by a new one, for instance of another version of this package, one at a time:
        a fresh spare process waits beside each that ends. Raises SetupError."""
        async with self.changing:
            await self._state.until(self._state.all_up)
            await self._spares.clear()
            for shard_id, shard in sorted(self._state.shards.items()):
                self._state.work = f"roll: shard {shard_id} of {len(self._state.shards)}"
                try:
                    await self._spares.keep([shard.node_id])
                    await self._spares.started(shard.node_id)
                    old = shard.handle
                    shard.leaves = True
                    ray.kill(old)
                    await self._state.until(lambda shard=shard, old=old: shard.handle not in (None, old))  # type: ignore[misc]
                finally:
                    self._state.work = ""
        return f"{len(self._state.shards)} shards have new processes"

    async def settle(self) -> str:
        """Adds or removes shards until there are as many as wanted, and experts where they should be."""
        async with self.changing:
            before = len(self._state.shards)
            while len(self._state.shards) != self._state.target and self._state.failure is None:
                await (self._grow() if len(self._state.shards) < self._state.target else self._shrink())
            self._state.metrics.shards(len(self._state.handles()), self._state.target)
            if not self._state.num_experts:
                return "settle: a dense model has no experts to move"
            if before == len(self._state.shards):
                return await self._balance("settle")
            return f"{before} -> {len(self._state.shards)} expert shards"

    async def guard(self, change: Awaitable[str]) -> None:
        """For changes that nobody waits for: their failure is a fault to be seen, the cluster serves on."""
        try:
            log.info("%s: %s", self._state.group, await change)
        except ClusterError as error:
            log.error("%s: %s", self._state.group, error)
            self._state.note(str(error))

    def _capacities(self, num_shards: int, total_shards: int | None = None) -> list[int]:
        """How many experts fit in each shard, all layers together; 0 for those past `num_shards`."""
        layers = len(self._state.sparse_layers)
        if self._state.config.expert_memory_bytes is not None:
            room = self._state.config.expert_memory_bytes // self._state.expert_bytes
        else:
            wanted = layers * (
                self._state.num_experts * self._state.config.min_copies + self._state.config.redundant_experts
            )
            room = -(-wanted // num_shards)
        return [room] * num_shards + [0] * ((total_shards or num_shards) - num_shards)

    def _check_experts(self) -> None:
        if not self._state.num_experts and self._state.failure is None:
            raise SetupError("this model is dense: it has no expert shards, attention replicas alone serve it")

    def _check_target(self, num_shards: int) -> None:
        self._check_experts()
        if not 1 <= num_shards <= self._state.num_experts:
            raise SetupError(
                f"{num_shards} expert shards for {self._state.num_experts} experts a layer: ask for 1 to "
                f"{self._state.num_experts}"
            )
        if self._state.failure is not None:
            raise self._state.failure

    async def _grow(self) -> None:
        shard_id = len(self._state.shards)
        shard = self._supervision.add(shard_id)
        self._state.work = f"adding shard {shard_id}: waiting for its process"
        try:
            try:
                async with asyncio.timeout(GROW_TIMEOUT_S):
                    await self._state.until(lambda: shard.handle is not None)
            except TimeoutError:
                self._state.target = shard_id
                self._supervision.remove_last()
                self._state.metrics.changed("add", "failed", 0)
                raise SetupError(
                    f"a process for shard {shard_id} was not there after {GROW_TIMEOUT_S:g} s: the Ray cluster has no "
                    f"room for {self._state.config.cpus_per_expert_shard:g} CPUs and "
                    f"{self._state.config.gpus_per_expert_shard or 0:g} GPUs more"
                ) from None
            await self._balance(f"add shard {shard_id}", spread=True)
        finally:
            self._state.work = ""

    async def _shrink(self) -> None:
        assert self._state.plan is not None
        last = len(self._state.shards) - 1
        self._state.work = f"removing shard {last}"
        try:
            plan = await asyncio.to_thread(
                eplb.rebalance,
                _padded(self._state.plan, last + 1),
                self._balance_load(),
                shards=self._capacities(last, last + 1),
                min_copies=self._state.config.min_copies,
            )
            await self._move(replace(plan, slices=plan.slices[:last]), f"remove shard {last}")
            self._supervision.remove_last()
            async with self._state.news:
                self._state.publish(self._state.plan)
        except SetupError:
            self._state.target = len(self._state.shards)  # there is no room: it stays
            self._state.metrics.changed("remove", "failed", 0)
            raise
        finally:
            self._state.work = ""

    async def _balance(self, why: str, *, spread: bool = False) -> str:
        """Moves experts to where the load asks for. spread: also to a shard that has none, whatever was measured."""
        assert self._state.plan is not None
        before = _padded(self._state.plan, len(self._state.shards))
        load = self._balance_load()
        plan = await asyncio.to_thread(  # 0.5 s for 28 layers of 64 experts on 16 shards
            eplb.rebalance,
            before,
            load,
            shards=self._capacities(len(self._state.shards)),
            min_copies=self._state.config.min_copies,
            max_moves=None if spread else self._state.config.rebalance_max_moves,
            min_gain=MIN_GAIN,
        )
        was, now = (eplb.imbalance(p, load, num_shards=len(self._state.shards)) for p in (before, plan))
        num_moves = len(eplb.moves(before, plan).added)
        if plan is not before:
            await self._move(plan, why)
        text = f"{why}: {num_moves} experts moved, imbalance {was:.2f} -> {now:.2f}"
        log.info("%s: %s", self._state.group, text)
        return text

    async def _move(self, plan: PlacementPlan, why: str) -> None:
        """Make before break. Raises ClusterError when a shard fails meanwhile; the old plan then stays."""
        assert self._state.plan is not None
        old = _padded(self._state.plan, len(self._state.shards))
        new = _padded(plan, len(self._state.shards))
        changed = [i for i in range(len(self._state.shards)) if old.slices[i] != new.slices[i]]
        await self._state.until(self._state.all_up)
        started, num_moves = time.monotonic(), len(eplb.moves(old, new).added)
        try:
            for n, shard_id in enumerate(changed):
                self._state.work = f"{why}: loading on shard {shard_id} ({n + 1} of {len(changed)})"
                await self._state.shards[shard_id].load(
                    _union(old.slices[shard_id], new.slices[shard_id]), this_actor()
                )
            async with self._state.news:
                self._state.publish(plan)
                epoch = self._state.plan.epoch
            await self._adopted(epoch)
        except ray.exceptions.RayError as error:
            self._state.metrics.changed(why.split()[0], "failed", 0)
            cause = getattr(error, "cause", None) or error
            text = f"{why} failed: a shard did not load ({cause!r}); the old plan stays"
            self._state.note(text)
            raise ClusterError(text) from error
        finally:
            self._state.work = ""
            await self._trim(changed)
        self._state.metrics.changed(why.split()[0], "done", num_moves)
        log.info("%s: %s moved %d experts in %.1f s", self._state.group, why, num_moves, time.monotonic() - started)

    async def _adopted(self, epoch: int) -> None:
        """Waits for the engines that are alive to have the plan."""
        limit = time.monotonic() - REPLICA_SILENCE_S
        async with self._state.news:
            try:
                async with asyncio.timeout(ADOPTION_TIMEOUT_S):
                    await self._state.news.wait_for(
                        lambda: all(r.epoch >= epoch for r in self._state.replicas.values() if r.asked_at > limit)
                    )
            except TimeoutError:
                log.warning("%s: not every engine has plan epoch %d yet", self._state.group, epoch)

    async def _trim(self, shard_ids: Sequence[int]) -> None:
        """Lets shards forget what the plan no longer gives them."""
        for shard_id in shard_ids:
            try:
                await self._state.shards[shard_id].load(self._state.slice_of(shard_id), this_actor())
            except (ray.exceptions.RayError, AssertionError) as error:
                log.info("%s: shard %d is not there to be trimmed: %r", self._state.group, shard_id, error)

    def _balance_load(self) -> Any:
        """What placement follows: the measured load, and a little for each expert, so that idle ones spread too."""
        rates = self._state.rates()
        return rates + max(float(rates.mean()), 1.0) * 0.01


def _padded(plan: PlacementPlan, num_shards: int) -> PlacementPlan:
    """The plan with empty slices for shards that are new."""
    if plan.num_shards >= num_shards:
        return plan
    return replace(plan, slices=(*plan.slices, *({} for _ in range(num_shards - plan.num_shards))))


def _union(first: Slice, second: Slice) -> dict[int, tuple[int, ...]]:
    return {
        layer_id: tuple(sorted({*first.get(layer_id, ()), *second.get(layer_id, ())}))
        for layer_id in sorted({*first, *second})
    }
