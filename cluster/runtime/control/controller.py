"""The expert controller: makes the shards, watches them, replaces the dead, moves experts, publishes plans.

No request passes through it. When it dies, serving goes on; Ray restarts it and it takes up the shards that run, by
their names, and what its predecessor left with them. Changes of placement come one after another and are made before
they are broken: load on the new shard, publish the plan, wait for its readers, unload on the old one.
"""

import asyncio
import itertools
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.evolving import on_wire, sent
from cluster.experts import eplb
from cluster.metrics import ControllerMetrics, new_registry, report_version
from cluster.runtime.control.changes import PlacementChanges
from cluster.runtime.control.collector import NodeCollectors
from cluster.runtime.control.load_watch import LoadWatch
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.control.spares import NO_SHARD, SpareProcesses
from cluster.runtime.control.state import ClusterState
from cluster.runtime.control.supervision import ShardSupervision
from cluster.runtime.names import NAMESPACE, controller_name, shard_prefix, spare_prefix
from cluster.runtime.process import actor_environment, prepare_process, process_info, share_of
from cluster.runtime.workers.protocol import LEASE_S, LONG_POLL_S, REPLICA_SILENCE_S, ClusterRecord, Membership
from cluster.status import ClusterStatus, ProcessInfo, ReplicaStatus

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0  # between two looks at the lease and at the cluster's nodes
RECALL_TIMEOUT_S = 5.0
REGISTRATION_S = 3.0  # in which the engines that live ask a controller that comes new, and say their slots


@on_wire("cluster.runtime.controller")
class ExpertController:
    """An asyncio actor, named `<group>:controller`. Every public method may be called at any time."""

    def __init__(self, group: str, config: ClusterConfig, *, collect_metrics: bool, lease_s: float = LEASE_S) -> None:
        prepare_process(1)
        self.collect_metrics = collect_metrics
        self.lease_s = lease_s
        self.state = ClusterState(group, config, ControllerMetrics(report_version(new_registry(), "controller")))
        self.spares = SpareProcesses(group, config)
        self.supervision = ShardSupervision(self.state, self.spares)
        self.changes = PlacementChanges(self.state, self.supervision, self.spares)
        self.collectors = NodeCollectors(group)
        self.draining = False
        self.last_asked = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._starting: asyncio.Task[None] | None = None
        self._slots_known_at = 0.0

    async def wait_plan(
        self, holder: str, process: ProcessInfo, engine: Any | None, known_epoch: int
    ) -> Membership | None:
        """The plan once its epoch is beyond `known_epoch`, None when there is no news for a while.

        `holder`, an engine, thereby says that it still needs the shards. Raises SetupError when they can never come up.
        """
        await self._start()
        state = self.state
        replica = self._register(holder, process, engine)
        async with state.news:
            replica.epoch = known_epoch
            state.news.notify_all()
            if state.published and state.plan is not None and known_epoch > state.plan.epoch:
                state.publish(state.plan, beyond=known_epoch)  # this controller is younger than the plan of its callers
            try:
                async with asyncio.timeout(LONG_POLL_S):
                    await state.news.wait_for(lambda: state.failure is not None or state.is_news(known_epoch))
            except TimeoutError:
                return None
        if state.failure is not None:
            raise state.failure
        assert state.plan is not None
        return Membership(plan=state.plan, handles=state.handles())

    async def slot(self, holder: str, process: ProcessInfo, engine: Any) -> int:
        """The place of an engine that starts: the lowest that no living one has."""
        await self._start()
        await asyncio.sleep(self._slots_known_at - time.monotonic())
        return self._register(holder, process, engine).process.slot

    def _register(self, holder: str, process: ProcessInfo, engine: Any | None) -> ReplicaStatus:
        """Takes note of an engine, or another holder, that asks."""
        self.last_asked = time.monotonic()
        replicas = self.state.replicas
        replica = replicas.get(holder)
        if replica is None:
            if engine is not None:
                taken = {r.process.slot for r in replicas.values()}
                free = next(slot for slot in itertools.count() if slot not in taken)
                process = replace(process, slot=free if process.slot in {-1, *taken} else process.slot)
            replica = replicas[holder] = ReplicaStatus(name=holder, process=process, engine=engine, asked_at=0.0)
            if engine is not None:
                self._watchers[holder] = asyncio.create_task(self._watch_engine(replica))
        replica.asked_at = self.last_asked
        return replica

    async def _watch_engine(self, replica: ReplicaStatus) -> None:
        """Forgets an attention replica when its engine dies. Serve replaces it; this is for who asks for the status."""
        try:
            await replica.engine.hold.remote()  # type: ignore[union-attr]
        except ray.exceptions.RayActorError:
            self.state.note(f"attention replica {replica.name} lost its engine")
        async with self.state.news:
            self.state.replicas.pop(replica.name, None)
            self._watchers.pop(replica.name, None)
            self.state.news.notify_all()

    async def apply(self, config: ClusterConfig) -> None:
        """Follows a redeployed configuration in what can change while shards run. The same one again changes nothing,
        so that a restarted ingress does not undo a scaling by hand."""
        await self._start()
        state = self.state
        if config == state.config:
            return
        before = state.config
        self._follow(config)
        if config.expert_shards != before.expert_shards:
            state.target = state.shards_of(config)
        state.remember()
        if state.failure is None:
            self._tasks.append(asyncio.create_task(self.changes.guard(self.changes.settle())))

    def _follow(self, config: ClusterConfig) -> None:
        """What runs already reads it from now on."""
        self.state.config = self.spares.config = config
        for shard in self.state.shards.values():
            shard.config = config

    async def scale(self, num_shards: int) -> str:
        """Adds or removes shards one at a time; returns what was done. Raises SetupError for what cannot be."""
        await self._start()
        return await self.changes.scale(num_shards)

    async def rebalance(self) -> str:
        """Follows the measured load; returns what was done. Raises SetupError."""
        await self._start()
        return await self.changes.rebalance()

    async def shuffle(self, num_swaps: int, seed: int) -> str:
        """As `PlacementChanges.shuffle`. Raises ClusterError."""
        await self._start()
        return await self.changes.shuffle(num_swaps, seed)

    async def roll(self) -> str:
        """As `PlacementChanges.roll`. Raises SetupError."""
        await self._start()
        return await self.changes.roll()

    async def report_load(self, name: str, loaded_bytes: int, total_bytes: int) -> None:
        """Takes note of how far a shard's or an attention replica's load is."""
        shards = {f"shard-{shard_id}": shard.status for shard_id, shard in self.state.shards.items()}
        if status := shards.get(name) or self.state.replicas.get(name):
            status.loaded_bytes, status.total_bytes = loaded_bytes, total_bytes

    async def status(self) -> ClusterStatus:
        await self._start()
        state = self.state
        self.last_asked = now = time.monotonic()
        state.replicas = {name: r for name, r in state.replicas.items() if now - r.asked_at < REPLICA_SILENCE_S}
        rates = state.rates()
        return ClusterStatus(
            epoch=state.plan.epoch if state.plan else 0,
            shards=tuple(shard.status for _, shard in sorted(state.shards.items())),
            replicas=tuple(state.replicas.values()),
            metrics_addresses=self.collectors.addresses,
            draining=self.draining,
            failure=str(state.failure or ""),
            plan=state.plan,
            published=state.published,
            uncovered_s=0.0 if state.uncovered_since is None else now - state.uncovered_since,
            target_shards=state.target,
            work=state.work,
            load=None if rates is None else rates.tolist(),
            imbalance=eplb.imbalance(state.plan, rates) if state.plan is not None and rates is not None else 1.0,
            faults=tuple(state.faults),
            config=state.config,
            process=process_info(),
        )

    async def process(self) -> ProcessInfo:
        return process_info()

    async def drain(self) -> None:
        """Tells the ingresses, who ask for the status, to take no new requests."""
        self.draining = True
        log.info("%s: draining", self.state.group)

    async def close(self) -> None:
        """Takes the shards down and gives their resources back; this actor is then of no more use."""
        for task in (*self._tasks, *self._watchers.values()):
            task.cancel()
        self.supervision.close()
        for _, actor in self._actors():
            ray.kill(actor)
        for shard_id in {*self.state.shards, *self.supervision.found}:
            ShardProcess(self.state.group, shard_id, self.state.config).remove()
        self.collectors.close()
        log.info("%s: closed", self.state.group)

    async def _start(self) -> None:
        """Begins the work with the first call: the event loop does not run yet in the constructor."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._begin())
        await self._starting

    async def _begin(self) -> None:
        state = self.state
        try:
            state.read_checkpoint()
            found = await self._recall()
            if found is not None or ray.get_runtime_context().was_current_actor_reconstructed:
                self._slots_known_at = time.monotonic() + REGISTRATION_S
            if found is not None:
                self._follow(found.config)
                state.target, state.plan = found.target, found.plan
                log.info("%s: goes on from plan epoch %d, %d shards", state.group, found.plan.epoch, found.target)
            else:
                state.plan = self.changes.first_plan()
        except SetupError as error:
            state.failure = error
            return
        state.metrics.shards(0, state.target)
        for shard_id in range(state.plan.num_shards):
            self.supervision.add(shard_id)
        if not state.plan.num_shards:  # a dense model: nothing loads before engines may start
            async with state.news:
                state.publish(state.plan)
        self._tasks = [asyncio.create_task(self._check()), asyncio.create_task(LoadWatch(state, self.changes).run())]
        if state.target != state.plan.num_shards:  # an earlier controller died over it
            self._tasks.append(asyncio.create_task(self.changes.guard(self.changes.settle())))

    async def _recall(self) -> ClusterRecord | None:
        """What an earlier controller of this group left with its shards; the newest, if any. Finds which actor is
        which shard; spare processes that it had are ended."""
        records: list[ClusterRecord] = []
        for name, actor in self._actors():
            try:
                async with asyncio.timeout(RECALL_TIMEOUT_S):
                    shard_id, record = await actor.which.remote(), await actor.recall.remote()
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("%s: %s does not answer: %r", self.state.group, name, error)
                continue
            if shard_id == NO_SHARD:
                ray.kill(actor)
                continue
            self.supervision.found[shard_id] = name
            records += [] if record is None else [record]
        return max(records, key=lambda record: record.version, default=None)

    def _actors(self) -> list[tuple[str, Any]]:
        """The running processes of this group's shards, and those that wait to become one, by name."""
        prefixes = shard_prefix(self.state.group), spare_prefix(self.state.group)
        names = sorted(actor["name"] or "" for actor in ray.util.list_named_actors(all_namespaces=True))
        found = []
        for name in names:
            if name.startswith(prefixes):
                with suppress(ValueError):  # it died since
                    found.append((name, ray.get_actor(name, namespace=NAMESPACE)))
        return found

    async def _check(self) -> None:
        """Looks after the lease and after one metrics collector for each node."""
        while True:
            if time.monotonic() - self.last_asked > self.lease_s:
                log.warning("%s: no one has asked for the shards in %g s", self.state.group, self.lease_s)
                await self.close()
                ray.actor.exit_actor()
            if self.collect_metrics:
                await self.collectors.keep(self.state.config)
            if self.state.shards and self.state.all_up():
                await self.spares.keep(shard.node_id for shard in self.state.shards.values())
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self.state.look.wait()
            self.state.look.clear()


def get_controller(group: str, config: ClusterConfig, *, collect_metrics: bool = True) -> Any:
    """The group's controller; makes it if there is none. It outlives who made it, by its lease."""
    return (
        ray.remote(sent(ExpertController))
        .options(
            name=controller_name(group),
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
