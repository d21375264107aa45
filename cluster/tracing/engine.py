"""An engine's spans of its requests: their time in the queue, prefill, decode, and some of their steps.

Used by the engine's thread. Knows no batch and no carrier: `engine/traced.py` hands it what a step is made of.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

from opentelemetry.trace import Span, SpanKind

from cluster.errors import ClusterError
from cluster.tracing.contexts import Place, pack, place_of
from cluster.tracing.dispatch import TracedDispatchMetrics
from cluster.tracing.spans import Spans, code_of, mark_failed, ours, place
from cluster.types import EngineRequest, SequenceUpdate

MOST_AT_ONCE = 64  # requests that get a span of one step; of further ones it counts in their phase only
TellShards = Callable[[Mapping[int, bytes]], None]
"""Given the spans to which the next rows of shards belong, packed, by the shards' ids; none ends that."""


def in_detail(step: int, num_steps: int) -> bool:
    """Whether a request's step has a span: its first num_steps, and then each power of two, so that a long answer shows
    its course in a few. step: from 1."""
    return bool(num_steps) and (step <= num_steps or step & (step - 1) == 0)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """sequences, rows: of the whole step, with those that are not traced.  shards: those that may get rows."""

    sequences: int
    rows: int
    shards: Sequence[int]


class TracedSequence:
    """One request in this engine. Times: nanoseconds of the wall clock."""

    def __init__(self, spans: Spans, parent: Place, request: EngineRequest, now: int) -> None:
        self._spans = spans
        self._whole = spans.begin(
            "engine", parent, now, prompt_tokens=len(request.prompt_token_ids), replays=request.num_replays
        )
        self._phase, self._name = spans.begin("queue", self._whole, now), "queue"
        self._num_tokens = self._num_steps = self._num_attempts = self._steps_in_phase = 0
        self._seconds = self._step_s = self._longest_s = 0.0
        self._last = now
        self._part: object = None

    def enters(self, phase: str, part: object, now: int) -> None:
        """A step of it begins, in this phase. part: of the batch; the one of the step before is another attempt."""
        if part is self._part:
            self._num_attempts += 1
            return
        self._part, self._num_attempts, self._step_s = part, 1, 0.0
        self._num_steps += 1
        if phase != self._name:
            began = now if self._name == "queue" else self._last  # phases of steps follow each other without a gap
            self._end_phase(began)
            self._phase, self._name = self._spans.begin(phase, self._whole, began), phase
        self._steps_in_phase += 1

    @property
    def num_steps(self) -> int:
        """Steps that it has begun."""
        return self._num_steps

    def step(self, facts: StepFacts, num_rows: int, now: int) -> Span:
        """A span of the step that it has entered."""
        return self._spans.begin(
            "step", self._phase, now,
            number=self._num_steps, attempt=self._num_attempts, rows=num_rows,
            step_rows=facts.rows, step_sequences=facts.sequences,
        )  # fmt: skip

    def leaves(self, seconds: float, now: int) -> None:
        """That attempt has ended."""
        self._seconds, self._step_s, self._last = self._seconds + seconds, self._step_s + seconds, now
        self._longest_s = max(self._longest_s, self._step_s)

    def gets(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def end(self, update: SequenceUpdate, now: int) -> None:
        """update: its last."""
        self._end_phase(now)
        self._whole.set_attributes(
            ours({"generated_tokens": self._num_tokens, "finish_reason": update.finish_reason or ""})
        )
        if update.error is not None:
            mark_failed(self._whole, code_of(update.error))
        self._whole.end(now)

    def _end_phase(self, now: int) -> None:
        if self._steps_in_phase:
            self._phase.set_attributes(
                ours({"steps": self._steps_in_phase, "steps_s": self._seconds, "longest_step_s": self._longest_s})
            )
        self._steps_in_phase, self._seconds, self._longest_s = 0, 0.0, 0.0
        self._phase.end(now)


class Part(NamedTuple):
    """A traced sequence in a step.  scheduled: what the step's batch has of it, by its identity."""

    sequence: TracedSequence
    phase: str
    num_rows: int
    scheduled: object


class EngineTracing:
    """Of one engine. num_steps: as of `in_detail`."""

    def __init__(
        self,
        spans: Spans,
        metrics: TracedDispatchMetrics,
        tell_shards: TellShards,
        num_steps: int,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._spans, self._metrics, self._tell_shards = spans, metrics, tell_shards
        self._num_steps, self._clock = num_steps, clock
        self._sequences: dict[str, TracedSequence] = {}

    def arrived(self, request: EngineRequest) -> None:
        """A request comes in."""
        parent = place_of(request.trace)
        if parent is not None and request.request_id not in self._sequences:
            self._sequences[request.request_id] = TracedSequence(self._spans, parent, request, self._clock())

    def told(self, updates: Iterable[SequenceUpdate]) -> None:
        """The news that leave the engine."""
        if not self._sequences:
            return
        for update in updates:
            sequence = self._sequences.get(update.request_id)
            if sequence is not None:
                sequence.gets(len(update.token_ids))
                if update.finish_reason is not None:
                    self._sequences.pop(update.request_id).end(update, self._clock())

    def find(self, request_id: str) -> TracedSequence | None:
        """None for a request that is not traced."""
        return self._sequences.get(request_id)

    def broke(self, error: BaseException) -> None:
        """The engine has ended by it, and so do its requests: sends their spans, as `Spans.flush` does."""
        failure = error if isinstance(error, ClusterError) else ClusterError(str(error))
        self.told(
            SequenceUpdate(request_id=request_id, finish_reason="error", error=failure)
            for request_id in list(self._sequences)
        )
        self.flush()

    def flush(self) -> None:
        """As of `Spans`; any thread may call it."""
        self._spans.flush()

    @contextmanager
    def step(self, parts: Sequence[Part], facts: StepFacts) -> Iterator[None]:
        """A step while it is computed; run again for fewer sequences, it is another attempt of the same step."""
        began = self._clock()
        for sequence, phase, _, scheduled in parts:
            sequence.enters(phase, scheduled, began)
        chosen = [part for part in parts if in_detail(part.sequence.num_steps, self._num_steps)]
        detailed = [part.sequence.step(facts, part.num_rows, began) for part in chosen[:MOST_AT_ONCE]]
        crossings = self._begin_crossings(detailed, facts.shards, began)
        try:
            yield
        except Exception as error:
            for span in detailed:
                mark_failed(span, code_of(error))
            raise
        finally:
            ended = self._clock()
            self._end_crossings(crossings, ended)
            for span in detailed:
                span.end(ended)
            for part in parts:
                part.sequence.leaves((ended - began) / 1e9, ended)

    def _begin_crossings(self, steps: Sequence[Span], shards: Sequence[int], now: int) -> dict[int, list[Span]]:
        """A span for each shard under each step's."""
        if not (steps and shards):
            return {}
        spans = {
            shard_id: [
                self._spans.begin(f"dispatch to shard {shard_id}", step, now, kind=SpanKind.CLIENT, shard_id=shard_id)
                for step in steps
            ]
            for shard_id in shards
        }
        self._metrics.begin()
        self._tell_shards({shard_id: pack(map(place, of_shard)) for shard_id, of_shard in spans.items()})
        return spans

    def _end_crossings(self, spans: Mapping[int, Sequence[Span]], now: int) -> None:
        """A shard that got no rows has no span."""
        if not spans:
            return
        self._tell_shards({})
        for shard_id, found in self._metrics.end().items():
            for span in spans.get(shard_id, ()):
                span.set_attributes(ours(asdict(found)))
                span.end(now)
