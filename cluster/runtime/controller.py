"""The expert controller: makes the shards, watches them, replaces the dead, moves experts, publishes plans.

No request passes through it. When it dies, serving goes on; Ray restarts it and it takes up the shards that run, by
their names, and what its predecessor left with them. Changes of placement come one after another and are made before
they are broken: load on the new shard, publish the plan, wait for its readers, unload on the old one.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ClusterConfig
from cluster.engine.local import resolve_dtype, torch_dtype
from cluster.errors import ClusterError, SetupError
from cluster.experts import eplb
from cluster.experts.load_meter import LoadMeter
from cluster.experts.placement import PlacementPlan, plan_evenly, swapped
from cluster.metrics import ControllerMetrics, new_registry, report_version
from cluster.runtime.actors import prepare_process
from cluster.runtime.collector import NodeMetricsActor
from cluster.runtime.process import actor_environment, share_of
from cluster.runtime.protocol import (
    LEASE_S,
    LONG_POLL_S,
    NAMESPACE,
    ClusterRecord,
    ClusterStatus,
    Fault,
    Membership,
    ProcessInfo,
    ReplicaStatus,
    process_info,
)
from cluster.runtime.shard_process import ShardProcess, Slice
from cluster.runtime.spares import NO_SHARD, SpareProcesses

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0  # between two looks at the lease and at the cluster's nodes
RESPAWN_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before the n-th respawn in a row; the last one repeats
REPLICA_SILENCE_S = 2.5 * LONG_POLL_S  # an engine asks for the plan once a long poll; a dead one no more
STABLE_S = 2.0  # a shard that was up for so long starts again at the first backoff: no row that it was sent kills it
LOAD_INTERVAL_S = 2.0  # between two looks at the experts' loads
LOAD_HALF_LIFE_S = 60.0  # of the loads that placement follows: longer than a burst, shorter than a change of traffic
LOAD_TIMEOUT_S = 2.0
ADOPTION_TIMEOUT_S = 5.0  # for engines to have a new plan; who comes later is refused by the shard and sends again
RECALL_TIMEOUT_S = 5.0
COLLECTOR_TIMEOUT_S = 1.0
GROW_TIMEOUT_S = 600.0  # for a new shard's process: a cluster that grows itself takes minutes for a node
MIN_GAIN = 0.05  # of a layer's slowest shard; less is not worth a move
MAX_FAULTS = 50  # that `status` remembers


class ExpertController:
    """An asyncio actor, named `<group>:controller`. Every public method may be called at any time."""

    def __init__(self, group: str, config: ClusterConfig, *, collect_metrics: bool, lease_s: float = LEASE_S) -> None:
        prepare_process(1)
        self.group = group
        self.config = config
        self.collect_metrics = collect_metrics
        self.lease_s = lease_s
        self.metrics = ControllerMetrics(report_version(new_registry(), "controller"))
        self.target = config.expert_shards
        self.shards: dict[int, ShardProcess] = {}
        self.spares = SpareProcesses(group, config)
        self.replicas: dict[str, ReplicaStatus] = {}
        self.collectors: dict[str, tuple[Any, str]] = {}
        self.faults: deque[Fault] = deque(maxlen=MAX_FAULTS)
        self.plan: PlacementPlan | None = None
        self.load: LoadMeter | None = None
        self.published = False
        self.draining = False
        self.failure: SetupError | None = None
        self.work = ""
        self.last_asked = time.monotonic()
        self._uncovered_since: float | None = None
        self._expert_bytes = 0
        self._num_experts = 0
        self._sparse_layers: tuple[int, ...] = ()
        self._news = asyncio.Condition()
        self._changing = asyncio.Lock()
        self._look = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[int, str] = {}  # shard -> actor, as found at the start
        self._supervisors: dict[int, asyncio.Task[None]] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._starting: asyncio.Task[None] | None = None

    async def wait_plan(
        self, holder: str, process: ProcessInfo, engine: Any | None, known_epoch: int
    ) -> Membership | None:
        """The plan once its epoch is beyond `known_epoch`, None when there is no news for a while.

        `holder`, an engine, thereby says that it still needs the shards. Raises SetupError when they can never come up.
        """
        await self._start()
        self.last_asked = time.monotonic()
        replica = self.replicas.get(holder)
        if replica is None:
            replica = ReplicaStatus(name=holder, process=process, engine=engine, asked_at=0.0)
            self.replicas[holder] = replica
            if engine is not None:
                self._watchers[holder] = asyncio.create_task(self._watch_engine(replica))
        replica.asked_at = self.last_asked
        async with self._news:
            replica.epoch = known_epoch
            self._news.notify_all()
            if self.published and self.plan is not None and known_epoch > self.plan.epoch:
                self._publish(self.plan, beyond=known_epoch)  # this controller is younger than the plan of its callers
            try:
                async with asyncio.timeout(LONG_POLL_S):
                    await self._news.wait_for(lambda: self.failure is not None or self._is_news(known_epoch))
            except TimeoutError:
                return None
        if self.failure is not None:
            raise self.failure
        assert self.plan is not None
        return Membership(plan=self.plan, handles=self._handles())

    async def _watch_engine(self, replica: ReplicaStatus) -> None:
        """Forgets an attention replica when its engine dies. Serve replaces it; this is for who asks for the status."""
        try:
            await replica.engine.hold.remote()  # type: ignore[union-attr]
        except ray.exceptions.RayActorError:
            self._note(f"attention replica {replica.name} lost its engine")
        async with self._news:
            self.replicas.pop(replica.name, None)
            self._watchers.pop(replica.name, None)
            self._news.notify_all()

    async def apply(self, config: ClusterConfig) -> None:
        """Follows a redeployed configuration in what can change while shards run. The same one again changes nothing,
        so that a restarted ingress does not undo a scaling by hand."""
        await self._start()
        if config == self.config:
            return
        before, self.config = self.config, config
        if config.expert_shards != before.expert_shards:
            self.target = config.expert_shards
        self._remember()
        if self.failure is None:
            self._tasks.append(asyncio.create_task(self._guard_change(self._settle())))

    async def scale(self, num_shards: int) -> str:
        """Adds or removes shards one at a time; returns what was done. Raises SetupError for what cannot be."""
        await self._start()
        self._check_target(num_shards)
        self.target = num_shards
        self._remember()
        return await self._settle()

    async def rebalance(self) -> str:
        """Follows the measured load; returns what was done. Raises SetupError."""
        await self._start()
        async with self._changing:
            return await self._balance("rebalance")

    async def shuffle(self, num_swaps: int, seed: int) -> str:
        """Swaps experts between shards for the sake of it: a rehearsal of moves. Raises ClusterError."""
        await self._start()
        async with self._changing:
            assert self.plan is not None
            await self._move(swapped(self.plan, num_swaps, seed), "shuffle")
        return f"{num_swaps} pairs of experts changed places"

    async def roll(self) -> str:
        """Replaces each shard's process by a new one, for instance of another version of this package, one at a time:
        a fresh spare process waits beside each that ends. Raises SetupError."""
        await self._start()
        async with self._changing:
            await self._until(lambda: all(shard.handle is not None for shard in self.shards.values()))
            await self.spares.clear()
            for shard_id, shard in sorted(self.shards.items()):
                self.work = f"roll: shard {shard_id} of {len(self.shards)}"
                try:
                    await self.spares.keep([shard.node_id])
                    await self.spares.started(shard.node_id)
                    old = shard.handle
                    shard.leaves = True
                    ray.kill(old)
                    await self._until(lambda shard=shard, old=old: shard.handle not in (None, old))  # type: ignore[misc]
                finally:
                    self.work = ""
        return f"{len(self.shards)} shards have new processes"

    async def report_load(self, name: str, loaded_bytes: int, total_bytes: int) -> None:
        """Takes note of how far a shard's or an attention replica's load is."""
        shards = {f"shard-{shard_id}": shard.status for shard_id, shard in self.shards.items()}
        if status := shards.get(name) or self.replicas.get(name):
            status.loaded_bytes, status.total_bytes = loaded_bytes, total_bytes

    async def status(self) -> ClusterStatus:
        await self._start()
        self.last_asked = now = time.monotonic()
        self.replicas = {name: r for name, r in self.replicas.items() if now - r.asked_at < REPLICA_SILENCE_S}
        rates = self._rates()
        return ClusterStatus(
            epoch=self.plan.epoch if self.plan else 0,
            shards=tuple(shard.status for _, shard in sorted(self.shards.items())),
            replicas=tuple(self.replicas.values()),
            metrics_addresses=tuple(address for _, address in self.collectors.values()),
            draining=self.draining,
            failure=str(self.failure or ""),
            plan=self.plan,
            published=self.published,
            uncovered_s=0.0 if self._uncovered_since is None else now - self._uncovered_since,
            target_shards=self.target,
            work=self.work,
            load=None if rates is None else rates.tolist(),
            imbalance=eplb.imbalance(self.plan, rates) if self.plan is not None and rates is not None else 1.0,
            faults=tuple(self.faults),
            config=self.config,
            process=process_info(),
        )

    async def process(self) -> ProcessInfo:
        return process_info()

    async def drain(self) -> None:
        """Tells the ingresses, who ask for the status, to take no new requests."""
        self.draining = True
        log.info("%s: draining", self.group)

    async def close(self) -> None:
        """Takes the shards down and gives their resources back; this actor is then of no more use."""
        for task in (*self._tasks, *self._supervisors.values(), *self._watchers.values()):
            task.cancel()
        for _, actor in self._actors():
            ray.kill(actor)
        for shard_id in {*self.shards, *self._running}:
            ShardProcess(self.group, shard_id, self.config).remove()
        for handle, _ in self.collectors.values():
            ray.kill(handle)
        log.info("%s: closed", self.group)

    # Start

    async def _start(self) -> None:
        """Begins the work with the first call: the event loop does not run yet in the constructor."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._begin())
        await self._starting

    async def _begin(self) -> None:
        try:
            reader = CheckpointReader(self.config.model)
            reader.check_names()
            dtype = torch_dtype(resolve_dtype(self.config.dtype, reader.config))
            self._expert_bytes = reader.config.expert_bytes(str(dtype).removeprefix("torch."))
            self._num_experts = reader.config.num_experts
            self._sparse_layers = tuple(reader.config.sparse_layers)
            self.load = LoadMeter(len(self._sparse_layers), self._num_experts, half_life_s=LOAD_HALF_LIFE_S)
            found = await self._recall()
            if found is not None:
                self.config, self.target, self.plan = found.config, found.target, found.plan
                log.info("%s: goes on from plan epoch %d, %d shards", self.group, found.plan.epoch, found.target)
            else:
                self.plan = self._first_plan()
        except SetupError as error:
            self.failure = error
            return
        self.metrics.shards(0, self.target)
        for shard_id in range(self.plan.num_shards):
            self._add_shard(shard_id)
        self._tasks = [asyncio.create_task(self._check()), asyncio.create_task(self._measure())]
        if self.target != self.plan.num_shards:  # an earlier controller died over it
            self._tasks.append(asyncio.create_task(self._guard_change(self._settle())))

    def _first_plan(self) -> PlacementPlan:
        plan = plan_evenly(self._sparse_layers, self._num_experts, self.target, epoch=0)
        if self.config.min_copies > 1 or self.config.redundant_experts:
            even = [[1.0] * self._num_experts for _ in self._sparse_layers]
            plan = eplb.rebalance(plan, even, shards=self._capacities(self.target), min_copies=self.config.min_copies)
        return replace(plan, epoch=0)

    async def _recall(self) -> ClusterRecord | None:
        """What an earlier controller of this group left with its shards; the newest, if any. Finds which actor is
        which shard; spare processes that it had are ended."""
        records: list[ClusterRecord] = []
        for name, actor in self._actors():
            try:
                async with asyncio.timeout(RECALL_TIMEOUT_S):
                    shard_id, record = await actor.which.remote(), await actor.recall.remote()
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("%s: %s does not answer: %r", self.group, name, error)
                continue
            if shard_id == NO_SHARD:
                ray.kill(actor)
                continue
            self._running[shard_id] = name
            records += [] if record is None else [record]
        return max(records, key=lambda record: record.version, default=None)

    def _remember(self) -> None:
        """Leaves with the shards what a successor must know."""
        if self.plan is None:
            return
        record = ClusterRecord(
            version=time.time(), plan=replace(self.plan, down=frozenset()), target=self.target, config=self.config
        )
        for shard in self.shards.values():
            if shard.handle is not None:
                shard.handle.remember.remote(record)

    def _actors(self) -> list[tuple[str, Any]]:
        """The running processes of this group's shards, and those that wait to become one, by name."""
        prefixes = f"{self.group}:shard-", f"{self.group}:spare-"
        names = sorted(actor["name"] or "" for actor in ray.util.list_named_actors(all_namespaces=True))
        found = []
        for name in names:
            if name.startswith(prefixes):
                with suppress(ValueError):  # it died since
                    found.append((name, ray.get_actor(name, namespace=NAMESPACE)))
        return found

    # Plans

    def _handles(self) -> dict[int, Any]:
        return {shard_id: s.handle for shard_id, s in self.shards.items() if s.handle is not None}

    def _is_news(self, known_epoch: int) -> bool:
        return self.published and self.plan is not None and self.plan.epoch > known_epoch

    def _publish(self, plan: PlacementPlan, *, beyond: int = 0) -> None:
        """Makes it the plan, under a higher epoch, and wakes who waits for one. Call with `_news` held."""
        up = self._handles().keys()
        epoch = max(plan.epoch, beyond, self.plan.epoch if self.plan else 0) + 1
        self.plan = replace(plan, epoch=epoch, down=frozenset(range(plan.num_shards)) - up)
        self.published = True
        self.metrics.plan_epoch(self.plan.epoch)
        self.metrics.shards(len(up), self.target)
        copies = Counter(
            min(2, sum(shard_id in up for shard_id in owners))
            for layer_id in self.plan.layer_ids
            for owners in self.plan.owners(layer_id)
        )
        self.metrics.coverage(copies[0], copies[1], copies[2])
        if not copies[0]:
            self._uncovered_since = None
        elif self._uncovered_since is None:
            self._uncovered_since = time.monotonic()
        self._remember()
        self._news.notify_all()
        log.info("%s: plan epoch %d, %d of %d shards up", self.group, self.plan.epoch, len(up), len(self.shards))

    # Shards

    def _add_shard(self, shard_id: int) -> ShardProcess:
        shard = self.shards[shard_id] = ShardProcess(self.group, shard_id, self.config)
        shard.status.actor = self._running.pop(shard_id, shard.name)
        self.metrics.expected(shard_id)
        self._supervisors[shard_id] = asyncio.create_task(self._guard(self._supervise(shard)))
        return shard

    async def _guard(self, work: Awaitable[None]) -> None:
        """Turns what ends the work into the controller's failure, which callers then see."""
        try:
            await work
        except SetupError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("%s: the supervision ended", self.group)
            await self._fail(SetupError(f"the expert controller failed: {error!r}"))

    async def _fail(self, error: SetupError) -> None:
        log.error("%s: %s", self.group, error)
        async with self._news:
            self.failure = error
            self._news.notify_all()

    async def _supervise(self, shard: ShardProcess) -> None:
        """Keeps one shard alive until cancelled. Raises SetupError when it cannot load."""
        failures = 0
        while True:
            up_since = time.monotonic()
            try:
                await self._bring_up(shard)
                up_since = time.monotonic()
                why = await shard.lost()
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SetupError):
                    raise error.cause from None
                why = f"failed: {error.cause!r}"
            except ray.exceptions.RayActorError:
                why = "died"
            failures = 0 if time.monotonic() - up_since > STABLE_S else failures
            log.warning("%s: shard %d %s (%s)", self.group, shard.shard_id, why, shard.status.process)
            if not shard.leaves:
                self._note(f"shard {shard.shard_id} {why}")
                self.metrics.respawned(shard.shard_id)
            was_up = shard.handle is not None
            shard.down()
            if was_up:
                async with self._news:
                    assert self.plan is not None
                    self._publish(self.plan)
            await asyncio.sleep(RESPAWN_BACKOFF_S[min(failures, len(RESPAWN_BACKOFF_S) - 1)])
            failures += 1

    async def _bring_up(self, shard: ShardProcess) -> None:
        """Finds or makes a shard's actor, loads its slice, publishes it."""
        await shard.start(self._emptiest_node(), self.spares)
        loaded: Slice | None = None
        while loaded != (wanted := self._slice(shard.shard_id)):  # the plan may change while it loads
            await shard.load(wanted, _me())
            loaded = wanted
        async with self._news:
            shard.up()
            assert self.plan is not None
            if self.published or all(other.handle is not None for other in self.shards.values()):
                self._publish(self.plan)
        self._look.set()
        log.info("%s: shard %d is up (%s)", self.group, shard.shard_id, shard.status.process)

    def _slice(self, shard_id: int) -> dict[int, tuple[int, ...]]:
        assert self.plan is not None
        return dict(self.plan.slices[shard_id]) if shard_id < self.plan.num_shards else {}

    def _emptiest_node(self) -> str | None:
        """The node with the fewest shards, of those that are large enough for one."""
        held = Counter(shard.node_id for shard in self.shards.values())
        need = {"CPU": self.config.cpus_per_expert_shard, "GPU": self.config.gpus_per_expert_shard or 0}
        need |= share_of(self.config.expert_resource)
        fits = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in need.items())
        ]
        return min(fits, key=lambda node_id: (held[node_id], node_id), default=None)

    def _note(self, what: str) -> None:
        self.faults.append(Fault(at=time.time(), what=what))

    # Changes of placement

    def _capacities(self, num_shards: int, total_shards: int | None = None) -> list[int]:
        """How many experts fit in each shard, all layers together; 0 for those past `num_shards`."""
        layers = len(self._sparse_layers)
        if self.config.expert_memory_bytes is not None:
            room = self.config.expert_memory_bytes // self._expert_bytes
        else:
            wanted = layers * (self._num_experts * self.config.min_copies + self.config.redundant_experts)
            room = -(-wanted // num_shards)
        return [room] * num_shards + [0] * ((total_shards or num_shards) - num_shards)

    def _check_target(self, num_shards: int) -> None:
        if not 1 <= num_shards <= self._num_experts:
            raise SetupError(
                f"{num_shards} expert shards for {self._num_experts} experts a layer: ask for 1 to {self._num_experts}"
            )
        if self.failure is not None:
            raise self.failure

    async def _guard_change(self, change: Awaitable[str]) -> None:
        """For changes that nobody waits for: their failure is a fault to be seen, the cluster serves on."""
        try:
            log.info("%s: %s", self.group, await change)
        except ClusterError as error:
            log.error("%s: %s", self.group, error)
            self._note(str(error))

    async def _settle(self) -> str:
        """Adds or removes shards until there are as many as wanted, and experts where they should be."""
        async with self._changing:
            before = len(self.shards)
            while len(self.shards) != self.target and self.failure is None:
                await (self._grow() if len(self.shards) < self.target else self._shrink())
            self.metrics.shards(len(self._handles()), self.target)
            if before == len(self.shards):
                return await self._balance("settle")
            return f"{before} -> {len(self.shards)} expert shards"

    async def _grow(self) -> None:
        shard_id = len(self.shards)
        shard = self._add_shard(shard_id)
        self.work = f"adding shard {shard_id}: waiting for its process"
        try:
            try:
                async with asyncio.timeout(GROW_TIMEOUT_S):
                    await self._until(lambda: shard.handle is not None)
            except TimeoutError:
                self.target = shard_id
                self._remove_last()
                self.metrics.changed("add", "failed", 0)
                raise SetupError(
                    f"a process for shard {shard_id} was not there after {GROW_TIMEOUT_S:g} s: the Ray cluster has no "
                    f"room for {self.config.cpus_per_expert_shard:g} CPUs and "
                    f"{self.config.gpus_per_expert_shard or 0:g} GPUs more"
                ) from None
            await self._balance(f"add shard {shard_id}", spread=True)
        finally:
            self.work = ""

    async def _shrink(self) -> None:
        assert self.plan is not None
        last = len(self.shards) - 1
        self.work = f"removing shard {last}"
        try:
            plan = await asyncio.to_thread(
                eplb.rebalance,
                self._padded(self.plan, last + 1),
                self._balance_load(),
                shards=self._capacities(last, last + 1),
                min_copies=self.config.min_copies,
            )
            await self._move(replace(plan, slices=plan.slices[:last]), f"remove shard {last}")
            self._remove_last()
            async with self._news:
                self._publish(self.plan)
        except SetupError:
            self.target = len(self.shards)  # there is no room: it stays
            self.metrics.changed("remove", "failed", 0)
            raise
        finally:
            self.work = ""

    def _remove_last(self) -> None:
        last = len(self.shards) - 1
        self._supervisors.pop(last).cancel()
        self.shards.pop(last).remove()

    async def _balance(self, why: str, *, spread: bool = False) -> str:
        """Moves experts to where the load asks for. spread: also to a shard that has none, whatever was measured."""
        assert self.plan is not None
        before = self._padded(self.plan, len(self.shards))
        load = self._balance_load()
        plan = await asyncio.to_thread(  # 0.5 s for 28 layers of 64 experts on 16 shards
            eplb.rebalance,
            before,
            load,
            shards=self._capacities(len(self.shards)),
            min_copies=self.config.min_copies,
            max_moves=None if spread else self.config.rebalance_max_moves,
            min_gain=MIN_GAIN,
        )
        was, now = (eplb.imbalance(p, load, num_shards=len(self.shards)) for p in (before, plan))
        num_moves = len(eplb.moves(before, plan).loaded)
        if plan is not before:
            await self._move(plan, why)
        text = f"{why}: {num_moves} experts moved, imbalance {was:.2f} -> {now:.2f}"
        log.info("%s: %s", self.group, text)
        return text

    async def _move(self, plan: PlacementPlan, why: str) -> None:
        """Make before break. Raises ClusterError when a shard fails meanwhile; the old plan then stays."""
        assert self.plan is not None
        old = self._padded(self.plan, len(self.shards))
        new = self._padded(plan, len(self.shards))
        changed = [i for i in range(len(self.shards)) if old.slices[i] != new.slices[i]]
        await self._until(lambda: all(shard.handle is not None for shard in self.shards.values()))
        started, num_moves = time.monotonic(), len(eplb.moves(old, new).loaded)
        try:
            for n, shard_id in enumerate(changed):
                self.work = f"{why}: loading on shard {shard_id} ({n + 1} of {len(changed)})"
                await self.shards[shard_id].load(_union(old.slices[shard_id], new.slices[shard_id]), _me())
            async with self._news:
                self._publish(plan)
                epoch = self.plan.epoch
            await self._adopted(epoch)
        except ray.exceptions.RayError as error:
            self.metrics.changed(why.split()[0], "failed", 0)
            cause = getattr(error, "cause", None) or error
            text = f"{why} failed: a shard did not load ({cause!r}); the old plan stays"
            self._note(text)
            raise ClusterError(text) from error
        finally:
            self.work = ""
            await self._trim(changed)
        self.metrics.changed(why.split()[0], "done", num_moves)
        log.info("%s: %s moved %d experts in %.1f s", self.group, why, num_moves, time.monotonic() - started)

    async def _adopted(self, epoch: int) -> None:
        """Waits for the engines that are alive to have the plan."""
        limit = time.monotonic() - REPLICA_SILENCE_S
        async with self._news:
            try:
                async with asyncio.timeout(ADOPTION_TIMEOUT_S):
                    await self._news.wait_for(
                        lambda: all(r.epoch >= epoch for r in self.replicas.values() if r.asked_at > limit)
                    )
            except TimeoutError:
                log.warning("%s: not every engine has plan epoch %d yet", self.group, epoch)

    async def _trim(self, shard_ids: Sequence[int]) -> None:
        """Lets shards forget what the plan no longer gives them."""
        for shard_id in shard_ids:
            try:
                await self.shards[shard_id].load(self._slice(shard_id), _me())
            except (ray.exceptions.RayError, AssertionError) as error:
                log.info("%s: shard %d is not there to be trimmed: %r", self.group, shard_id, error)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._news:
            await self._news.wait_for(lambda: condition() or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    @staticmethod
    def _padded(plan: PlacementPlan, num_shards: int) -> PlacementPlan:
        """The plan with empty slices for shards that are new."""
        if plan.num_shards >= num_shards:
            return plan
        return replace(plan, slices=(*plan.slices, *({} for _ in range(num_shards - plan.num_shards))))

    # Load

    def _rates(self) -> Any:
        return None if self.load is None else self.load.rates(time.monotonic())

    def _balance_load(self) -> Any:
        """What placement follows: the measured load, and a little for each expert, so that idle ones spread too."""
        rates = self._rates()
        return rates + max(float(rates.mean()), 1.0) * 0.01

    async def _measure(self) -> None:
        """Follows the loads of the experts, and rebalances by them where the configuration says so."""
        balanced_at = time.monotonic()
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            await asyncio.gather(
                *(self._measure_shard(shard) for shard in self.shards.values()),
                *(self._measure_replica(replica) for replica in self.replicas.values()),
            )
            if self.plan is None or not self.published:
                continue
            imbalance = eplb.imbalance(self.plan, self._rates())
            self.metrics.imbalance(imbalance)
            due = 0 < self.config.rebalance_interval_s <= time.monotonic() - balanced_at
            if due and imbalance > self.config.rebalance_threshold and not self._changing.locked():
                balanced_at = time.monotonic()
                async with self._changing:
                    await self._guard_change(self._balance("rebalance"))

    async def _measure_shard(self, shard: ShardProcess) -> None:
        if shard.handle is None or self.load is None:
            return
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                counters = await shard.handle.expert_tokens.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return  # its supervisor finds out why
        if counters is not None:
            own = counters[list(self._sparse_layers)].numpy()
            self.load.observe((shard.shard_id, shard.status.process), own, time.monotonic())

    async def _measure_replica(self, replica: ReplicaStatus) -> None:
        if replica.engine is None:
            return
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                replica.stats = await replica.engine.stats.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return  # it is loading, or on its way out

    # Lease and metrics

    async def _check(self) -> None:
        """Looks after the lease and after one metrics collector for each node."""
        while True:
            if time.monotonic() - self.last_asked > self.lease_s:
                log.warning("%s: no one has asked for the shards in %g s", self.group, self.lease_s)
                await self.close()
                ray.actor.exit_actor()
            if self.collect_metrics:
                await self._collect_from_nodes()
            if self.shards and all(shard.handle is not None for shard in self.shards.values()):
                await self.spares.keep(shard.node_id for shard in self.shards.values())
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self._look.wait()
            self._look.clear()

    async def _collect_from_nodes(self) -> None:
        alive: Mapping[str, str] = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        for node_id in list(self.collectors):
            if node_id not in alive or not await _lives(self.collectors[node_id][0]):
                del self.collectors[node_id]
        for node_id in alive.keys() - self.collectors.keys():
            handle = (
                ray.remote(NodeMetricsActor)
                .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
                .remote(self.group, self.config.metrics_host, self.config.metrics_port)
            )
            try:
                self.collectors[node_id] = (handle, await handle.address.remote())
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                log.error("%s: no metrics from node %s: %s", self.group, alive[node_id], error)


def get_controller(group: str, config: ClusterConfig, *, collect_metrics: bool = True) -> Any:
    """The group's controller; makes it if there is none. It outlives who made it, by its lease."""
    return (
        ray.remote(ExpertController)
        .options(
            name=f"{group}:controller",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=share_of(config.ingress_resource),
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=1000,
            # Not in the placement group of the replica that happens to make it, with which it would die.
            scheduling_strategy=PlacementGroupSchedulingStrategy(None),
            runtime_env=actor_environment(group, 1),
        )
        .remote(group, config, collect_metrics=collect_metrics)
    )


async def _lives(collector: Any) -> bool:
    """False for one that died; one that is slow to answer is still there."""
    with suppress(TimeoutError):
        try:
            async with asyncio.timeout(COLLECTOR_TIMEOUT_S):
                await collector.address.remote()
        except ray.exceptions.RayActorError:
            return False
    return True


def _me() -> Any:
    return ray.get_runtime_context().current_actor


def _union(first: Slice, second: Slice) -> dict[int, tuple[int, ...]]:
    return {
        layer_id: tuple(sorted({*first.get(layer_id, ()), *second.get(layer_id, ())}))
        for layer_id in sorted({*first, *second})
    }
