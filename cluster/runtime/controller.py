"""The expert controller: makes the shards, watches them, replaces the dead, publishes plans.

No request passes through it. When it dies, serving goes on; Ray restarts it and it takes up the shards that run,
by their names.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.metrics import ControllerMetrics, new_registry
from cluster.runtime.actors import SHARD_GROUPS, ExpertShardActor, prepare_process
from cluster.runtime.collector import NodeMetricsActor
from cluster.runtime.process import actor_environment, num_threads
from cluster.runtime.protocol import (
    LEASE_S,
    LONG_POLL_S,
    NAMESPACE,
    ClusterStatus,
    Membership,
    ProcessInfo,
    ReplicaStatus,
    ShardStatus,
)

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0  # between two looks at the lease and at the cluster's nodes
RESPAWN_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before the n-th respawn in a row; the last one repeats
REPLICA_SILENCE_S = 2.5 * LONG_POLL_S  # an engine asks for the plan once a long poll; a dead one no more
STABLE_S = 60.0  # a shard that was up for so long starts again at the first backoff


class ExpertController:
    """An asyncio actor, named `<group>:controller`. Every public method may be called at any time."""

    def __init__(self, group: str, config: ClusterConfig, *, collect_metrics: bool, lease_s: float = LEASE_S) -> None:
        prepare_process(1)
        self.group = group
        self.config = config
        self.collect_metrics = collect_metrics
        self.lease_s = lease_s
        self.metrics = ControllerMetrics(new_registry())
        self.statuses: list[ShardStatus] = []
        self.handles: dict[int, Any] = {}
        self.replicas: dict[str, ReplicaStatus] = {}
        self.collectors: dict[str, tuple[Any, str]] = {}
        self.plan: PlacementPlan | None = None
        self.published = False
        self.draining = False
        self.failure: SetupError | None = None
        self.last_asked = time.monotonic()
        self._news = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._dtype = config.dtype

    async def wait_plan(
        self, holder: str, process: ProcessInfo, engine: Any | None, known_epoch: int
    ) -> Membership | None:
        """The plan once its epoch is beyond `known_epoch`, None when there is no news for a while.

        `holder`, an engine, thereby says that it still needs the shards. Raises SetupError when they can never come up.
        """
        self._start()
        self.last_asked = time.monotonic()
        replica = self.replicas.setdefault(
            holder, ReplicaStatus(name=holder, process=process, engine=engine, asked_at=0.0)
        )
        replica.asked_at = self.last_asked
        async with self._news:
            if self.plan is not None and self.published and known_epoch > self.plan.epoch:
                self._publish(beyond=known_epoch)  # this controller is younger than the plan its callers have
            try:
                async with asyncio.timeout(LONG_POLL_S):
                    await self._news.wait_for(lambda: self.failure is not None or self._is_news(known_epoch))
            except TimeoutError:
                return None
        if self.failure is not None:
            raise self.failure
        assert self.plan is not None
        return Membership(plan=self.plan, handles=dict(self.handles))

    async def report_load(self, name: str, loaded_bytes: int, total_bytes: int) -> None:
        """Takes note of how far a shard's or an attention replica's load is."""
        shards = {f"shard-{status.shard_id}": status for status in self.statuses}
        if status := shards.get(name) or self.replicas.get(name):
            status.loaded_bytes, status.total_bytes = loaded_bytes, total_bytes

    async def status(self) -> ClusterStatus:
        self._start()
        self.last_asked = now = time.monotonic()
        self.replicas = {name: r for name, r in self.replicas.items() if now - r.asked_at < REPLICA_SILENCE_S}
        return ClusterStatus(
            epoch=self.plan.epoch if self.plan else 0,
            shards=tuple(self.statuses),
            replicas=tuple(self.replicas.values()),
            metrics_addresses=tuple(address for _, address in self.collectors.values()),
            draining=self.draining,
            failure=str(self.failure or ""),
            plan=self.plan,
        )

    async def drain(self) -> None:
        """Tells the ingresses, who ask for the status, to take no new requests."""
        self.draining = True
        log.info("%s: draining", self.group)

    async def close(self) -> None:
        """Takes the shards down and gives their resources back; this actor is then of no more use."""
        for task in self._tasks:
            task.cancel()
        for shard_id in range(self.config.expert_shards):
            handle = self._find(shard_id)
            if handle is not None:
                ray.kill(handle)
        for handle, _ in self.collectors.values():
            ray.kill(handle)
        group = _find_placement_group(self._placement_group_name)
        if group is not None:
            remove_placement_group(group)
        log.info("%s: closed", self.group)

    def _start(self) -> None:
        """Begins the work with the first call: the event loop does not run yet in the constructor."""
        if self._tasks or self.failure:
            return
        try:
            reader = CheckpointReader(self.config.model)
            reader.check_names()
            self.plan = plan_evenly(
                reader.config.sparse_layers, reader.config.num_experts, self.config.expert_shards, epoch=0
            )
        except SetupError as error:
            self.failure = error
            return
        self.statuses = [ShardStatus(shard_id=i) for i in range(self.config.expert_shards)]
        self.metrics.shards(0, self.config.expert_shards)
        self._tasks = [
            asyncio.create_task(self._guard(self._run_shards())),
            asyncio.create_task(self._check()),
        ]

    def _is_news(self, known_epoch: int) -> bool:
        return self.published and self.plan is not None and self.plan.epoch > known_epoch

    def _publish(self, *, beyond: int = 0) -> None:
        """Gives the plan a higher epoch and wakes who waits for one. Call with `_news` held."""
        assert self.plan is not None
        self.plan = replace(self.plan, epoch=max(self.plan.epoch, beyond) + 1)
        self.published = True
        up = len(self.handles)
        self.metrics.plan_epoch(self.plan.epoch)
        self.metrics.shards(up, len(self.statuses))
        copies = [
            sum(shard_id in self.handles for shard_id in owners)
            for layer_id in self.plan.layer_ids
            for owners in self.plan.owners(layer_id)
        ]
        self.metrics.coverage(copies.count(0), copies.count(1), sum(n > 1 for n in copies))
        self._news.notify_all()
        log.info("%s: plan epoch %d, %d of %d shards up", self.group, self.plan.epoch, up, len(self.statuses))

    async def _guard(self, work: Any) -> None:
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

    async def _run_shards(self) -> None:
        group = await self._reserve()
        async with asyncio.TaskGroup() as shards:
            for status in self.statuses:
                shards.create_task(self._guard(self._supervise(status, group)))

    async def _reserve(self) -> PlacementGroup:
        """The placement group with a bundle a shard; waits for the cluster to have room."""
        group = _find_placement_group(self._placement_group_name)
        if group is None:
            bundle = {"CPU": self.config.cpus_per_expert_shard}
            if self.config.gpus_per_expert_shard:
                bundle["GPU"] = self.config.gpus_per_expert_shard
            group = placement_group(
                [bundle] * self.config.expert_shards,
                strategy="SPREAD",
                name=self._placement_group_name,
                lifetime="detached",
            )
        while True:
            ready, _ = await asyncio.wait([asyncio.ensure_future(_as_future(group.ready()))], timeout=30.0)
            if ready:
                return group
            log.warning("%s: waiting for %s", self.group, [*group.bundle_specs])

    async def _supervise(self, status: ShardStatus, group: PlacementGroup) -> None:
        """Keeps one shard alive until cancelled. Raises SetupError when it cannot load."""
        failures = 0
        while True:
            up_since = time.monotonic()
            try:
                handle = await self._bring_up(status, group)
                up_since = time.monotonic()
                await handle.hold.remote()
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SetupError):
                    raise error.cause from None
                log.warning("%s: shard %d failed: %r", self.group, status.shard_id, error.cause)
            except ray.exceptions.RayActorError:
                log.warning("%s: shard %d died (%s)", self.group, status.shard_id, status.process)
            failures = 0 if time.monotonic() - up_since > STABLE_S else failures
            status.state, status.respawns, status.loaded_bytes = "lost", status.respawns + 1, 0
            self.metrics.respawned(status.shard_id)
            async with self._news:
                if self.handles.pop(status.shard_id, None) is not None:
                    self._publish()
            await asyncio.sleep(RESPAWN_BACKOFF_S[min(failures, len(RESPAWN_BACKOFF_S) - 1)])
            failures += 1

    async def _bring_up(self, status: ShardStatus, group: PlacementGroup) -> Any:
        """Finds or makes a shard's actor, loads its slice, publishes it."""
        assert self.plan is not None
        wanted = dict(self.plan.slices[status.shard_id])
        handle = self._find(status.shard_id) or self._create(status.shard_id, group)
        status.state = "loading"
        if await handle.held.remote() != wanted:
            me = ray.get_runtime_context().current_actor
            await handle.load.remote(self.config.model, wanted, self.config.dtype, self.config.device, me)
        status.process = await handle.process.remote()
        status.state = "up"
        async with self._news:
            self.handles[status.shard_id] = handle
            if len(self.handles) == len(self.statuses) or self.published:
                self._publish()
        log.info("%s: shard %d is up (%s)", self.group, status.shard_id, status.process)
        return handle

    def _create(self, shard_id: int, group: PlacementGroup) -> Any:
        threads = num_threads(self.config.cpus_per_expert_shard)
        return (
            ray.remote(concurrency_groups=SHARD_GROUPS)(ExpertShardActor)
            .options(
                name=self._shard_name(shard_id),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                num_cpus=self.config.cpus_per_expert_shard,
                num_gpus=self.config.gpus_per_expert_shard or 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=shard_id),
                runtime_env=actor_environment(self.group, threads),
            )
            .remote(shard_id, threads)
        )

    def _find(self, shard_id: int) -> Any | None:
        try:
            return ray.get_actor(self._shard_name(shard_id), namespace=NAMESPACE)
        except ValueError:
            return None

    def _shard_name(self, shard_id: int) -> str:
        return f"{self.group}:shard-{shard_id}"

    @property
    def _placement_group_name(self) -> str:
        return f"{self.group}:shards"

    async def _check(self) -> None:
        """Looks after the lease and after one metrics collector for each node."""
        while True:
            if time.monotonic() - self.last_asked > self.lease_s:
                log.warning("%s: no one has asked for the shards in %g s", self.group, self.lease_s)
                await self.close()
                ray.actor.exit_actor()
            if self.collect_metrics:
                await self._collect_from_nodes()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def _collect_from_nodes(self) -> None:
        alive: Mapping[str, str] = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        for node_id in self.collectors.keys() - alive.keys():
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
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=1000,
            # Not in the placement group of the replica that happens to make it, with which it would die.
            scheduling_strategy=PlacementGroupSchedulingStrategy(None),
            runtime_env=actor_environment(group, 1),
        )
        .remote(group, config, collect_metrics=collect_metrics)
    )


async def _as_future(ref: Any) -> Any:
    return await ref


def _find_placement_group(name: str) -> PlacementGroup | None:
    for group_id, entry in placement_group_table().items():
        if entry["name"] == name and entry["state"] != "REMOVED":
            return PlacementGroup(ray.PlacementGroupID.from_hex(group_id))
    return None
