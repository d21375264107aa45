"""A controller's parts on processes that are none: they start in a second, load in one, and die when told to."""

import asyncio
import itertools
from collections import deque
from types import SimpleNamespace

import ray
import torch
import virtual_time

from cluster.config import ClusterConfig
from cluster.experts.pulse import Sign
from cluster.metrics import ControllerMetrics, new_registry
from cluster.runtime.control.capacity import first_plan
from cluster.runtime.control.changes import PlacementChanges
from cluster.runtime.control.drains import Drains
from cluster.runtime.control.engines import Engines
from cluster.runtime.control.expert_facts import ExpertFacts
from cluster.runtime.control.launcher import Node, Place
from cluster.runtime.control.load_watch import LoadWatch
from cluster.runtime.control.news import News
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.control.shards import Shards
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.control.state import ClusterState
from cluster.runtime.control.supervision import ShardSupervision
from cluster.status import ProcessInfo

CONFIG = ClusterConfig(model="model", expert_shards=2, shard_timeout_s=10.0, spare_processes=False)
FACTS = ExpertFacts(sparse_layers=(0, 1), num_experts=4, expert_bytes=10)
NODES = ("a", "b")
START_S, LOAD_S = 1.0, 1.0


def task_error(cause):
    """As Ray raises what a call has raised."""
    return ray.exceptions.RayTaskError("load", "Traceback …", cause)


def unwatched(coroutine):
    """Its task, whose failure is no news where nobody waits for it."""
    task = asyncio.ensure_future(coroutine)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


class FakeActor:
    """A shard's process. `actor.method.remote(...)` is awaited, as Ray's are.

    errors: raised by the next loads.  stopped: answers nothing.  stuck_s: its sign of life says so.
    counters: [layers, E] of the tokens computed.
    """

    METHODS = ("which", "become", "load", "held", "process", "sign", "hold", "remember", "recall", "expert_tokens")

    def __init__(self, launcher, name, shard_id, node_id):
        self.launcher, self.name, self.shard_id, self.node_id = launcher, name, shard_id, node_id
        self.pid = next(launcher.pids)
        self.errors = launcher.errors
        self.experts, self.record, self.stopped, self.stuck_s = {}, None, False, 0.0
        self.counters = torch.zeros((2, 4), dtype=torch.int64)
        self.death = asyncio.get_running_loop().create_future()

    def __getattr__(self, method):
        if method not in self.METHODS:
            raise AttributeError(method)

        def remote(*args, **options):
            return unwatched(self._call(method, args, options))

        return SimpleNamespace(remote=remote)

    async def _call(self, method, args, options):
        answer = unwatched(getattr(self, f"_{method}")(*args, **options))
        try:
            await asyncio.wait([answer, self.death], return_when=asyncio.FIRST_COMPLETED)
            if self.death.done():
                raise ray.exceptions.RayActorError
            return answer.result()
        finally:
            answer.cancel()

    async def _answer(self, event=None):
        if self.stopped:
            await asyncio.Event().wait()
        if event is not None:
            self.launcher.log.append(event)

    async def _which(self):
        await self._answer(("which", self.name))
        return self.shard_id

    async def _become(self, shard_id):
        await self._answer(("become", self.name, shard_id))
        self.shard_id = shard_id

    async def _load(self, model, wanted, dtype, device, controller):
        await asyncio.sleep(LOAD_S)
        await self._answer(("load", self.shard_id, wanted))
        if self.errors:
            error = self.errors.popleft()
            if isinstance(error, ray.exceptions.RayActorError):
                self.die()
            raise error
        self.experts = wanted

    async def _held(self):
        await self._answer()
        return self.experts

    async def _process(self):
        await self._answer()
        return ProcessInfo(pid=self.pid, node_id=self.node_id, gpu_ids=())

    async def _sign(self):
        await self._answer()
        return Sign(busy=True, stuck_s=self.stuck_s)

    async def _hold(self):
        await asyncio.shield(self.death)

    async def _remember(self, record):
        await self._answer()
        self.record = record

    async def _recall(self):
        await self._answer()
        return self.record

    async def _expert_tokens(self, as_array):
        await self._answer()
        return self.counters.numpy()

    def die(self):
        self.launcher.actors.pop(self.name, None)
        if not self.death.done():
            self.death.set_result(None)


class FakeLauncher:
    """A `Launcher`. log: what happened, in order.  starts: (time, name) of each process.  full: no node has room.
    errors: raised by the next loads, of any process.  gcs_away: what is asked of Ray's GCS waits.
    leaving: the nodes that Ray drains, where nothing has room.  waiting: places that wait for room.
    blocking: what was asked of Ray's GCS outside its thread."""

    def __init__(self):
        self.actors, self.log, self.starts, self.killed = {}, [], [], []
        self.errors, self.pids, self.full = deque(), itertools.count(1), False
        self.reserved, self.gcs_away = {}, False
        self.leaving, self.restarts = {}, 0
        self.waiting, self.blocking, self.threaded = set(), [], False

    async def in_thread(self, method, *arguments):
        await asyncio.sleep(0)
        while self.gcs_away:
            await asyncio.sleep(1)
        self.threaded = True
        try:
            return method(*arguments)
        finally:
            self.threaded = False

    def me(self):
        return "controller"

    def restarted(self):
        return False

    def nodes(self):
        return [Node(name, {"CPU": 8.0}) for name in NODES]

    def find(self, name):
        return self.actors.get(name)

    def named(self):
        return sorted(self.actors.items())

    def draining(self):
        return dict(self.leaving)

    def places(self):
        return {**dict.fromkeys(self.waiting, ""), **{name: place.node_id for name, place in self.reserved.items()}}

    async def reserve(self, name, node_id, config):
        if name in self.reserved:
            return self.reserved[name]
        self.waiting.add(name)
        while self.full or self.gcs_away or not (open_nodes := [node for node in NODES if node not in self.leaving]):
            await asyncio.sleep(1)
        self.waiting.discard(name)
        return self.reserved.setdefault(name, Place(node_id if node_id in open_nodes else open_nodes[0], name))

    def start_shard(self, name, shard_id, place, config):
        return self._start(name, shard_id, place.node_id)

    def start_spare(self, name, node_id, config):
        return self._start(name, -1, node_id)

    def _start(self, name, shard_id, node_id):
        self.starts.append((virtual_time.now(), name))
        self.actors[name] = FakeActor(self, name, shard_id, node_id)
        return self.actors[name]

    def end(self, actor):
        self.log.append(("end", actor.name))
        actor.die()

    def restart(self, actor):
        self.restarts += 1

    async def kill(self, process):
        self.killed.append(process.pid)

    def give_back(self, place_name):
        if not self.threaded:
            self.blocking.append(place_name)
        self.waiting.discard(place_name)
        self.reserved.pop(place_name, None)


class FakeCluster:
    """The parts, as the controller makes them. Make it inside a running `virtual_time` loop."""

    def __init__(self, config=CONFIG, launcher=None):
        clock = virtual_time.now
        self.launcher, self.registry, news = launcher or FakeLauncher(), new_registry(), News()
        metrics = self.metrics = ControllerMetrics(self.registry)
        self.shards = Shards()
        self.state = ClusterState("g", config, self.shards, metrics, news=news, clock=clock, wall_clock=clock)
        self.engines = Engines(news, self.state.note, draining=lambda: self.state.draining, clock=clock)
        self.spares = SpareProcesses("g", self.state, self.launcher)
        self.supervision = ShardSupervision(
            self.state, self.shards, metrics, make_shard=self.make_shard, launcher=self.launcher,
            on_up=lambda: None, clock=clock,
        )  # fmt: skip
        self.loads = LoadWatch(self.state, self.shards, self.engines, metrics, FACTS, clock=clock)
        self.changes = PlacementChanges(
            self.state, self.shards, self.supervision, self.spares, self.engines,
            facts=FACTS, rates=self.loads.rates, metrics=metrics, clock=clock,
        )  # fmt: skip
        self.drains = Drains(
            self.state, self.shards, self.supervision, self.changes, self.spares,
            launcher=self.launcher, metrics=metrics, home="head", clock=clock,
        )  # fmt: skip

    def make_shard(self, name):
        return ShardProcess("g", name, configured=self.state, launcher=self.launcher, spares=self.spares)

    def begin(self):
        self.state.begin(first_plan(self.state.config, FACTS, self.state.target))
        for _ in range(self.state.target):
            self.supervision.add()

    async def up(self):
        """With all its shards."""
        self.begin()
        await self.state.until(self.shards.all_up)
        self.launcher.log.clear()
        return self

    def actor(self, shard_id):
        return self.shards[shard_id].handle

    def value(self, name, **labels):
        return self.registry.get_sample_value(f"moecluster_controller_{name}", labels)
