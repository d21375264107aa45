"""A cluster in virtual time: requests arrive, engines make steps, tokens go back. No thread and no clock."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.planning.costs import StepCosts, StepTime
from cluster.planning.engine import EngineModel, Limits, Step
from cluster.planning.load import Load, Request
from cluster.planning.sharing import LEAST_S, SharedCores, step_s

FEW_ENGINES = 8  # up to so many each step is an event of its own: the others' being busy decides how long it takes
MOST_STEPS = 32  # in one event otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterModel:
    """shards: 0 for a dense model.  latency_s: between a client and its engine, both ways together.  imbalance: the
    busiest shard's load over the mean.  cores: None where each process has hardware of its own."""

    replicas: int
    shards: int
    limits: Limits
    latency_s: float = 0.0
    imbalance: float = 1.0
    cores: SharedCores | None = None


@dataclass(slots=True, kw_only=True)
class Record:
    """All that happened. Seconds of each request that was answered, in the order of their ends.

    attention_s, shard_s, crossing_s: that engines spent with each, all together, were they alone.  waited_s: for
    shards, likewise, beyond what they did meanwhile.  step_s: with steps.  replica_s: that all replicas lived.
    """

    first_token_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    refused: int = 0
    failures: int = 0
    replica_s: float = 0.0
    preempted: int = 0
    steps: int = 0
    samples: int = 0
    attention_s: float = 0.0
    shard_s: float = 0.0
    crossing_s: float = 0.0
    waited_s: float = 0.0
    step_s: float = 0.0
    end_s: float = 0.0
    most_replicas: int = 0

    @property
    def requests_s(self) -> float:
        return len(self.whole_s) / max(self.end_s, 1e-9)

    @property
    def mean_step_s(self) -> float:
        return self.step_s / max(1, self.steps)


@dataclass(slots=True, eq=False)
class _Engine:
    """version: grows when what it was to do next is no longer so."""

    model: EngineModel
    step: Step | None = None
    time: StepTime | None = None
    began: float = 0.0
    each_s: float = 0.0
    version: int = 0
    leaving: bool = False


class Simulation:
    """Run it once. on_ended: called with the number of requests that have ended, now and then.
    to_first_refusal: ends there."""

    def __init__(
        self, cluster: ClusterModel, costs: StepCosts, load: Load, *, seed: int = 0,
        on_ended: Callable[[int], None] = lambda _: None, to_first_refusal: bool = False,
    ) -> None:  # fmt: skip
        self.cluster = cluster
        self.record = Record(most_replicas=cluster.replicas)
        self.now = 0.0
        self._costs, self._load, self._on_ended = costs, load, on_ended
        self._to_first_refusal = to_first_refusal
        self._draw = random.Random(seed)
        self._engines = [_Engine(EngineModel(cluster.limits)) for _ in range(cluster.replicas)]
        self._staying = [*self._engines]  # those that take requests
        self.target = cluster.replicas  # that are to stay; dead ones are replaced up to it
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0
        self._busy = 0
        self._stalled_until = 0.0
        self._crowding = 1.0  # a step's time over what it takes alone
        self._homeless: list[Request] = []  # no replica takes them
        self._counted_at = 0.0
        self._ended = 0
        self._most_steps = 1 if cluster.replicas <= FEW_ENGINES else MOST_STEPS

    def run(self) -> Record:
        self._arrivals = self._load.beginning()
        self._take_next_arrival()
        while self._ended < self._load.num_requests and not (self._to_first_refusal and self.record.refused):
            self.now, _, happen, what = heapq.heappop(self._events)
            happen(what)
        self._count_replicas()
        self.record.preempted += sum(engine.model.num_preempted for engine in self._engines)
        return self.record

    @property
    def num_replicas(self) -> int:
        """That live, those that leave among them."""
        return len(self._engines)

    def staying_models(self) -> list[EngineModel]:
        """Of the replicas that take requests."""
        return [engine.model for engine in self._staying]

    def after(self, seconds: float, happen: Callable[[Any], None], what: Any) -> None:
        """Lets something happen later."""
        self._at(self.now + seconds, happen, what)

    def add_replica(self) -> None:
        """One that was asked for is there, if it is still wanted."""
        if len(self._staying) >= self.target:
            return
        self._count_replicas()
        engine = _Engine(EngineModel(self.cluster.limits))
        self._engines.append(engine)
        self._staying.append(engine)
        self.record.most_replicas = max(self.record.most_replicas, len(self._engines))
        homeless, self._homeless = self._homeless, []
        for request in homeless:
            self._arrive(request)

    def kill_replica(self, draw: random.Random, recovery_s: float) -> None:
        """One of those that live; its requests go on at others. Where it was to stay, a successor comes after
        recovery_s."""
        self._count_replicas()
        engine = self._engines.pop(draw.randrange(len(self._engines)))
        if not engine.leaving:
            self._staying.remove(engine)
            self.after(recovery_s, lambda _: self.add_replica(), None)
        engine.version += 1
        self._busy -= engine.step is not None
        self.record.preempted += engine.model.num_preempted
        for request in engine.model.take_all():
            request.replayed = True
            self._arrive(request)

    def stall(self, seconds: float) -> None:
        """A shard is gone without a copy: no step ends before its successor is there."""
        self._stalled_until = max(self._stalled_until, self.now + seconds)

    def retire_replica(self) -> None:
        """One fewer is to stay: of those with the fewest requests one takes no more and goes when it is empty, unless
        one that died is not replaced yet."""
        self.target -= 1
        if len(self._staying) > self.target:
            engine = min(self._staying, key=lambda engine: engine.model.num_requests)
            self._staying.remove(engine)
            engine.leaving = True
            self._leave(engine)

    def _leave(self, engine: _Engine) -> None:
        if engine.leaving and engine.step is None and not engine.model.num_requests:
            self._count_replicas()
            self.record.preempted += engine.model.num_preempted
            self._engines.remove(engine)

    def _count_replicas(self) -> None:
        """Adds the time since the last change of their number."""
        self.record.replica_s += len(self._engines) * (self.now - self._counted_at)
        self._counted_at = self.now

    def _at(self, moment: float, happen: Callable[[Any], None], what: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (moment, self._order, happen, what))

    def _take_next_arrival(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            self._at(max(self.now, request.arrived + self._way_s), self._arrive_in_turn, request)

    def _arrive_in_turn(self, request: Request) -> None:
        self._take_next_arrival()
        self._arrive(request)

    def _arrive(self, request: Request) -> None:
        engine = self._choose()
        if engine is None:
            self._homeless.append(request)
        elif not engine.model.add(request):
            self.record.refused += 1
            self._end(request)
        elif engine.step is None:
            self._start(engine)
        elif engine.step.steps > 1 and engine.model.num_free_places > 0:
            self._cut_short(engine)

    def _choose(self) -> _Engine | None:
        """Of two at random the one with fewer requests, as Serve's balancer does; None where no replica stays."""
        engines = self._staying
        some = self._draw.sample(engines, 2) if len(engines) > 2 else engines
        return min(some, key=lambda engine: engine.model.num_requests, default=None)

    @property
    def _way_s(self) -> float:
        """From a client to its engine, or back. Where cores are shared, what is in front waits for them as steps do."""
        return self.cluster.latency_s / 2 * self._crowding

    def _start(self, engine: _Engine) -> None:
        step = engine.model.plan(self._most_steps)
        if step is None:
            if not self._busy:
                self._crowding = 1.0
            return
        engine.step, engine.began = step, self.now
        self._busy += 1
        time = StepTime.of(self._costs, step.work, self.cluster.shards, self.cluster.imbalance)
        engine.each_s = step_s(time, self._busy, cores=self.cluster.cores, front_s=self._front_s(step))
        engine.time = time
        self._crowding = max(1.0, engine.each_s / max(LEAST_S, time.alone))
        self._at(self.now + step.steps * engine.each_s, self._finish, (engine, engine.version, step.steps))

    def _front_s(self, step: Step) -> float:
        if self.cluster.cores is None:
            return 0.0
        prompt_tokens = sum(tokens for _, tokens in step.parts)
        return self.cluster.cores.front.of_step(
            tokens=step.work.samples, requests=step.begun, prompt_tokens=prompt_tokens
        )

    def _cut_short(self, engine: _Engine) -> None:
        """Lets a row of steps end with the one that is under way: a prompt has come that the next one takes in."""
        assert engine.step is not None
        num_steps = min(engine.step.steps, int((self.now - engine.began) / engine.each_s) + 1)
        engine.version += 1
        self._at(engine.began + num_steps * engine.each_s, self._finish, (engine, engine.version, num_steps))

    def _finish(self, what: tuple[_Engine, int, int]) -> None:
        engine, version, num_steps = what
        if version != engine.version or engine.step is None:
            return
        if self.now < self._stalled_until:
            self._at(self._stalled_until, self._finish, what)
            return
        step, engine.step = engine.step, None
        self._busy -= 1
        self._note(engine, step, num_steps)
        found = engine.model.finish(step, num_steps)
        seen = self.now + self._way_s
        for request in found.first_tokens:
            request.first_token = seen
        for request in found.ended:
            self._answer(request, seen)
        self._start(engine)
        self._leave(engine)

    def _note(self, engine: _Engine, step: Step, num_steps: int) -> None:
        record, time = self.record, engine.time
        assert time is not None, "its step has begun"
        record.steps += num_steps
        record.samples += num_steps * step.work.samples
        record.step_s += num_steps * engine.each_s
        record.attention_s += num_steps * time.attention
        record.shard_s += num_steps * time.shard
        record.crossing_s += num_steps * time.crossing
        record.waited_s += num_steps * max(0.0, time.shard - time.shared)

    def _answer(self, request: Request, seen: float) -> None:
        assert request.first_token is not None, "it has a last token"
        request.ended = seen = max(seen, request.first_token)
        record = self.record
        record.first_token_s.append(request.first_token - request.arrived)
        record.whole_s.append(seen - request.arrived)
        if request.output_tokens > 1:
            record.per_token_s.append((seen - request.first_token) / (request.output_tokens - 1))
        record.output_tokens += request.output_tokens
        record.prompt_tokens += request.prompt_tokens
        record.end_s = max(record.end_s, seen)
        self._end(request)

    def _end(self, request: Request) -> None:
        self._ended += 1
        if self._ended % 100 == 0:
            self._on_ended(self._ended)
        seen = self.now + self._way_s
        following = self._load.after(request, seen)
        if following is not None:
            self._at(seen + self._way_s, self._arrive, following)
