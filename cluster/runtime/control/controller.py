"""The expert controller: makes the shards, watches them, replaces the dead, moves experts, publishes plans.

No request passes through it. When it dies, serving goes on; Ray restarts it and it takes up the shards that run, by
their names, and what its predecessor left with them.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.evolving import on_wire
from cluster.experts import eplb
from cluster.experts.placement import num_shards_for
from cluster.metrics import ControllerMetrics, new_registry, report_version
from cluster.runtime.control.adapters import AdapterCalls, SharedAdapters
from cluster.runtime.control.calls import PlacementCalls
from cluster.runtime.control.capacity import first_plan
from cluster.runtime.control.changes import PlacementChanges
from cluster.runtime.control.collector import NodeCollectors
from cluster.runtime.control.drains import Drains
from cluster.runtime.control.engines import Engines
from cluster.runtime.control.expert_facts import ExpertFacts, read_expert_facts
from cluster.runtime.control.launcher import Launcher, RayLauncher
from cluster.runtime.control.load_watch import LoadWatch
from cluster.runtime.control.news import News
from cluster.runtime.control.recall import recall
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.control.shards import Shards
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState
from cluster.runtime.control.supervision import ShardSupervision
from cluster.runtime.names import NAMESPACE, controller_name
from cluster.runtime.process import prepare_process, process_info, shared_actor_options
from cluster.runtime.ray_private.core import by_name
from cluster.runtime.workers.protocol import LEASE_S, LONG_POLL_S, Membership
from cluster.status import ClusterStatus, ProcessInfo

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0  # between two looks at the lease and at the cluster's nodes
REGISTRATION_S = 3.0  # in which the engines that live ask a controller that comes new, and say their slots


@on_wire("cluster.runtime.controller", former=("_actors", "_follow", "_recall", "_register", "_watch_engine"))
class ExpertController(AdapterCalls, PlacementCalls):
    """An asyncio actor of the group's name. Every public method may be called at any time."""

    def __init__(
        self,
        group: str,
        config: ClusterConfig,
        *,
        collect_metrics: bool,
        lease_s: float = LEASE_S,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """launcher: Ray's by default."""
        prepare_process()
        self._clock = clock
        self._collect_metrics, self._lease_s = collect_metrics, lease_s
        self._launcher = launcher or RayLauncher(group)
        self._metrics = ControllerMetrics(report_version(new_registry(), "controller"))
        news, self._look = News(), asyncio.Event()
        self.shards = Shards()
        self.state = ClusterState(group, config, self.shards, self._metrics, news=news, clock=clock)
        self.engines = Engines(news, self.state.note, draining=lambda: self.state.draining, clock=clock)
        self.adapters = SharedAdapters(self.state, self.shards, self.engines)
        self._spares = SpareProcesses(group, self.state, self._launcher)
        self._supervision = ShardSupervision(
            self.state,
            self.shards,
            self._metrics,
            make_shard=self._make_shard,
            launcher=self._launcher,
            on_up=self._look.set,
            clock=clock,
        )
        self._load_watch: LoadWatch | None = None  # these three once the checkpoint is read
        self._changes: PlacementChanges | None = None
        self._drains: Drains | None = None
        self._collectors = NodeCollectors(group)
        self._draining = False
        self._renewed_at = self._clock()
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Task[None] | None = None
        self._slots_known_at = 0.0

    async def wait_plan(
        self, holder: str, process: ProcessInfo, engine: Any | None, known_epoch: int
    ) -> Membership | None:
        """The plan once its epoch is beyond `known_epoch`, None when there is no news for a while.

        `holder`, an engine, thereby says that it still needs the shards. Raises SetupError when they can never come up.
        """
        await self._start()
        await self.renew_lease()
        state = self.state
        self.engines.has_plan(self.engines.register(holder, process, engine), known_epoch)
        if state.published and known_epoch > state.plan.epoch:
            state.publish(beyond=known_epoch)  # this controller is younger than the plan of its callers
        try:
            async with asyncio.timeout(LONG_POLL_S):
                await state.until(lambda: state.is_news(known_epoch))
        except TimeoutError:
            return None
        return Membership(plan=state.plan, handles=self.shards.handles(), take_traces=self.shards.take_traces())

    async def slot(self, holder: str, process: ProcessInfo, engine: Any) -> int:
        """The place of an engine that starts: the lowest that no living one has."""
        await self._start()
        await self.renew_lease()
        await asyncio.sleep(self._slots_known_at - self._clock())
        return self.engines.register(holder, process, engine).process.slot

    async def renew_lease(self) -> None:
        """Says that somebody needs the shards: without a call for the lease's time the controller takes them down."""
        self._renewed_at = self._clock()

    async def apply(self, config: ClusterConfig) -> None:
        """Follows a redeployed configuration in what can change while shards run. The same one again changes nothing,
        so that a restarted ingress does not undo a scaling by hand."""
        await self._start()
        if config == (before := self.state.config):
            return
        self.state.follow(config)
        self._tasks.append(asyncio.create_task(self.adapters.follow(before, config)))
        if self._changes is not None:
            self._tasks.append(asyncio.create_task(self._changes.guard(self._changes.settle())))

    async def note_fault(self, what: str) -> None:
        """For those who watch: something that was asked of the cluster failed. Not again what was just noted here."""
        if not any(fault.what in what for fault in self.state.faults[-1:]):
            self.state.note(what)

    async def report_load(self, name: str, loaded_bytes: int, total_bytes: int) -> None:
        """Takes note of how far a shard's or an attention replica's load is."""
        shards = {f"shard-{shard.shard_id}": shard.status for shard in self.shards}
        if status := shards.get(name) or self.engines.find(name):
            status.loaded_bytes, status.total_bytes = loaded_bytes, total_bytes

    async def status(self) -> ClusterStatus:
        """Asking changes nothing: it keeps no cluster alive."""
        await self._start()
        state, plan = self.state, self.state.known_plan
        rates = None if self._load_watch is None else self._load_watch.rates()
        return ClusterStatus(
            epoch=plan.epoch if plan else 0,
            shards=tuple(shard.status for shard in self.shards),
            replicas=self.engines.known(),
            metrics_addresses=self._collectors.addresses,
            draining=self._draining,
            failure=str(state.failure or ""),
            plan=plan,
            published=state.published,
            uncovered_s=state.uncovered_s,
            target_shards=state.target,
            work="" if self._changes is None else self._changes.work,
            load=None if rates is None else rates.tolist(),
            imbalance=1.0 if plan is None or rates is None else eplb.imbalance(plan, rates),
            faults=state.faults,
            config=state.config,
            process=process_info(),
            lease_by_renewal=True,
            adapters=self.adapters.current.names,
            adapters_version=self.adapters.current.version,
            leaving=() if self._drains is None else self._drains.leaving(),
        )

    async def process(self) -> ProcessInfo:
        return process_info()

    async def drain(self) -> None:
        """The ingresses, which ask for the status, take no new requests from now on."""
        self._draining = True
        log.info("%s: draining", self.state.group)

    async def close(self) -> None:
        """Takes the shards down and gives their resources back; this actor is then of no more use."""
        for task in self._tasks:
            task.cancel()
        if self._drains is not None:
            self._drains.close()
        self.engines.close()
        for _, actor in self._launcher.named():
            self._launcher.end(actor)
        self._supervision.close()
        for place in self._launcher.places():  # of a shard that was being moved
            self._launcher.give_back(place)
        self._collectors.close()
        log.info("%s: closed", self.state.group)

    def _make_shard(self, name: str) -> ShardProcess:
        return ShardProcess(self.state.group, name, configured=self.state, launcher=self._launcher, spares=self._spares)

    async def _start(self) -> None:
        """Begins the work with the first call: the event loop does not run yet in the constructor."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._begin())
        await self._starting

    async def _begin(self) -> None:
        state = self.state
        try:
            facts = read_expert_facts(state.config)
            await self.adapters.begin()
            record, left = await recall(state.group, self._launcher)
            if record is not None or self._launcher.restarted():
                self._slots_known_at = self._clock() + REGISTRATION_S
                self._tasks.append(asyncio.create_task(self.adapters.recover(REGISTRATION_S)))
            if record is not None:
                state.resume(record)
                log.info("%s: goes on from plan epoch %d, %d shards", state.group, record.plan.epoch, record.target)
            else:
                num_shards = num_shards_for(facts.num_experts, state.config.expert_shards)
                state.begin(first_plan(state.config, facts, num_shards))
        except SetupError as error:
            state.fail(error)
            return
        loads, changes, drains = self._plan_with(facts)
        self._supervision.take_over(left)
        for _ in range(state.plan.num_shards):
            self._supervision.add()
        self._tasks += [
            asyncio.create_task(self._check()),
            asyncio.create_task(drains.run()),
            asyncio.create_task(loads.run(lambda: changes.guard(changes.rebalance()), lambda: changes.busy)),
        ]
        if state.target != state.plan.num_shards:  # an earlier controller died over it
            self._tasks.append(asyncio.create_task(changes.guard(changes.settle())))

    def _plan_with(self, facts: ExpertFacts) -> tuple[LoadWatch, PlacementChanges, Drains]:
        """Makes the parts that must know the model's experts."""
        self._load_watch = LoadWatch(self.state, self.shards, self.engines, self._metrics, facts, clock=self._clock)
        self._changes = PlacementChanges(
            self.state,
            self.shards,
            self._supervision,
            self._spares,
            self.engines,
            facts=facts,
            rates=self._load_watch.rates,
            metrics=self._metrics,
            clock=self._clock,
        )
        self._drains = Drains(
            self.state,
            self.shards,
            self._supervision,
            self._changes,
            self._spares,
            launcher=self._launcher,
            metrics=self._metrics,
            home=process_info().node_id,
            clock=self._clock,
        )
        return self._load_watch, self._changes, self._drains

    async def _check(self) -> None:
        """Looks after the lease and after one metrics collector for each node."""
        while True:
            if self._clock() - self._renewed_at > self._lease_s:
                log.warning("%s: no one has needed the shards for %g s", self.state.group, self._lease_s)
                await self.close()
                ray.actor.exit_actor()
            if self._collect_metrics:
                await self._collectors.keep(self.state.config)
            if len(self.shards) and self.shards.all_up():
                await self._spares.keep(shard.node_id for shard in self.shards)
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self._look.wait()
            self._look.clear()


def get_controller(group: str, config: ClusterConfig, *, collect_metrics: bool = True) -> Any:
    """The group's controller; makes it if there is none. It outlives its maker, by its lease."""
    return (
        ray.remote(by_name(ExpertController))
        .options(
            name=controller_name(group),
            namespace=NAMESPACE,
            max_concurrency=1000,
            **shared_actor_options(group, config.ingress_resource),
        )
        .remote(group, config, collect_metrics=collect_metrics)
    )
