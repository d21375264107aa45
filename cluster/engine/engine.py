"""The engine: takes requests, makes steps, reports tokens. Knows no thread, no network and no text.

engine.submit(request); updates = engine.step()      # schedule → run → update
"""

import logging
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from cluster.config import EngineConfig
from cluster.engine.adapters import Adapters
from cluster.engine.block_manager import BlockManager
from cluster.engine.compiling import Compiling
from cluster.engine.early_cancels import EarlyCancels
from cluster.engine.fitting import fitting
from cluster.engine.holding import Holding
from cluster.engine.isolation import OnStep, failure_of, prove, run_isolated
from cluster.engine.outcomes import Gathering
from cluster.engine.retry_hint import RetryHint
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence
from cluster.engine.step import Batch, Runner, ScheduledSequence, StepResult
from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled
from cluster.grammar.grammars import Grammars
from cluster.idle_memory import idle_memory
from cluster.metrics import EngineMetrics
from cluster.model.adapters import Adapter
from cluster.model.sampler import NoFiniteNumbers, Sampled
from cluster.types import EngineRequest, EngineStats, FinishReason, SamplingParams, SequenceUpdate

log = logging.getLogger(__name__)


class Engine:
    """Used by one thread. Every request that `submit` accepts ends in exactly one update with a finish_reason."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        blocks: BlockManager,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.monotonic,
        seeds: random.Random | None = None,
        on_step: OnStep = lambda _: None,
        grammars: Grammars | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.runner = runner
        self.config = config
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.metrics = metrics
        self.clock = clock
        self.seeds = seeds or random.Random()
        self.on_step = on_step
        self.blocks = blocks
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_ahead=runner.num_ahead,
        )
        self.holding = Holding(self.scheduler.running, runner, self.clock)
        self.compiling = Compiling(grammars)
        self.adapters = adapters or Adapters()
        self.sequences: dict[str, Sequence] = {}
        self.num_generated_tokens = self.num_drafted_tokens = self.num_accepted_tokens = 0
        self._retry_hint = RetryHint(self.clock())
        self._unreturned: list[SequenceUpdate] = []
        self._cancelled_early = EarlyCancels()
        self._gathering = Gathering()

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._unreturned)

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        return EngineStats(
            running=len(self.scheduler.running),
            held=len(self.holding),
            waiting=len(self.scheduler.waiting) + len(self.compiling),
            used_blocks=self.blocks.num_used,
            num_blocks=self.blocks.num_blocks,
            generated_tokens=self.num_generated_tokens,
            drafted_tokens=self.num_drafted_tokens,
            accepted_tokens=self.num_accepted_tokens,
            at=time.time(),
            block_size=self.blocks.block_size,
            max_model_len=self.max_model_len,
            cache_tokens=min(self.blocks.max_tokens, self.max_model_len),
            kv_cache_dtype=self.config.kv_cache_dtype,
        )

    def submit(self, request: EngineRequest) -> None:
        """Queues a request. Raises Overloaded, InvalidRequest, RequestCancelled; then nothing of it is left here."""
        if self._cancelled_early.take(request.request_id):
            raise RequestCancelled("the request was cancelled before it began")
        if request.request_id in self.sequences:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use by a running request", "request_id")
        params = fitting(request, self.max_model_len, self.blocks.max_tokens)
        adapter = self.adapters.find(request.adapter) if request.adapter else None
        num_queued = self.scheduler.num_queued + len(self.compiling)
        if not request.num_replays and num_queued >= self.config.max_waiting:
            self._make_room(request.client)
        if params.seed is None:
            params = replace(params, seed=self.seeds.getrandbits(63))
        sequence = self._add(request, params, adapter)
        if request.output_token_ids and (reason := sequence.end()):
            self._end(sequence, reason)  # the earlier attempt got to the end, and its last update was lost

    def cancel(self, request_id: str) -> None:
        """Stops a sequence and frees its blocks at once.

        An unknown id is no error: it has finished, or its request comes later and then ends as it begins.
        """
        if sequence := self.sequences.get(request_id):
            self._end(sequence, "cancelled")
        else:
            self._cancelled_early.add(request_id)

    def step(self) -> list[SequenceUpdate]:
        """Makes one step and returns its updates, ends of cancelled and expired sequences included. Blocks.

        An exception at one sequence ends that one. Raises the exceptions that end them all.
        """
        self._expire()
        self._take_compiled()
        self.holding.release()
        batch = self._schedule()
        for _ in range(batch.num_preempted):
            self.metrics.preempted()
        self.metrics.reused(batch.num_reused_tokens)
        new = self._run(batch) if batch.scheduled else []
        updates, self._unreturned = [*self._unreturned, *new], []  # a score may have left earlier tokens
        num_held = len(self.holding)
        if num_held and not batch.scheduled and not updates:
            self.holding.wait()
        elif len(self.compiling) and not batch.scheduled and not updates:
            self.compiling.wait()
        num_running, num_waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        self.metrics.state(num_running, num_held, num_waiting, self.blocks.num_used, self.blocks.num_blocks)
        return updates

    def _add(self, request: EngineRequest, params: SamplingParams, adapter: Adapter | None) -> Sequence:
        """Queues a sequence."""
        now, eos_token_ids = self.clock(), () if params.ignore_eos else self.eos_token_ids
        sequence = Sequence(
            request=request,
            params=params,
            stop_token_ids=frozenset({*params.stop_token_ids, *eos_token_ids}),
            arrived_at=now,
            deadline=None if request.timeout_s is None else now + request.timeout_s,
            adapter=adapter,
        )
        if request.constraint is None:
            self.scheduler.add(sequence)
        else:
            self.compiling.begin(sequence)
        self.sequences[request.request_id] = sequence
        return sequence

    def _take_compiled(self) -> None:
        """Queues the sequences whose grammar is ready."""
        for sequence, error in self.compiling.take_ready():
            self.scheduler.add(sequence)
            if error is not None:
                self._fail(sequence, error)
            elif sequence.request.output_token_ids and (reason := sequence.end()):
                self._end(sequence, reason)  # the earlier attempt completed the grammar

    def _make_room(self, client: str) -> None:
        """In a full queue the client with the most waiting requests loses its latest. Raises Overloaded if that is
        this one."""
        limit = self.config.max_waiting
        later_s = self._retry_hint.seconds(limit)
        places = f"all {self.config.max_num_seqs} places are taken"
        taken = f"the queue is full ({limit} requests wait)" if limit else places
        full = Overloaded.later(taken, later_s)
        loser = self.scheduler.waiting.to_make_room(client)
        if loser is None:
            raise full
        self._end(loser, "error", full)

    def _schedule(self) -> Batch:
        while True:
            try:
                return self.scheduler.schedule()
            except Exception as error:
                if self.scheduler.planned is None:
                    raise
                self._fail(self.scheduler.planned, error)
                self.scheduler.planned = None

    def _run(self, batch: Batch) -> list[SequenceUpdate]:
        started = self.clock()
        for s in batch.scheduled:
            if not s.sequence.started:
                s.sequence.started = True
                self.metrics.queue_wait(started - s.sequence.arrived_at)
        result = run_isolated(self.runner, batch, self.on_step)
        num_prefill_tokens, num_decode_tokens = result.num_tokens(batch)
        idle_memory.worked(num_prefill_tokens + num_decode_tokens)
        self.metrics.step(self.clock() - started, num_prefill_tokens, num_decode_tokens, len(batch.scheduled))
        self.num_drafted_tokens += result.num_drafted
        self.num_accepted_tokens += result.num_accepted
        self.metrics.drafted(result.num_drafted, result.num_accepted)
        updates = []
        self._hold(result, batch)
        for i, s in enumerate(batch.scheduled):
            if i in result.lost:
                continue
            try:
                if i in result.failed:
                    raise result.failed[i]
                updates += self._advance(s, result.tokens[i], result.parts.get(i))
            except Exception as error:  # noqa: BLE001 it is this sequence's alone
                self._fail(s.sequence, error)
        if len(result.failed) == len(batch.scheduled):
            prove(self.runner, self.blocks, self.on_step, batch.scheduled[0].sequence.request.wants)
        return updates

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a sequence with the exception that it met."""
        if isinstance(error, NoFiniteNumbers):
            self.blocks.disown(sequence)  # the fault may have begun before it showed
        self._end(sequence, "error", failure_of(sequence.request.called, error))

    def _hold(self, result: StepResult, batch: Batch) -> None:
        errors = {batch.scheduled[i].sequence: error for i, error in result.lost.items()}
        for sequence in self.holding.hold(errors, result.epoch):
            log.warning("sequence %s ends: %s", sequence.request.called, errors[sequence])
            self._end(sequence, "error", errors[sequence])

    def _advance(
        self, scheduled: ScheduledSequence, new_tokens: Seq[Sampled], part: Tensor | None
    ) -> list[SequenceUpdate]:
        """Takes in what a step brought one sequence: the tokens up to the one that ends it, or a part of its result."""
        sequence, first = scheduled.sequence, scheduled.sequence.num_computed_tokens
        sequence.lost_since = None
        taken = sequence.take(new_tokens)
        sequence.num_computed_tokens += scheduled.num_tokens + max(0, len(taken) - 1)
        self.blocks.remember(sequence)
        if not sequence.wants_tokens:
            self._gathering.add(sequence, part, first=first)
            return [] if sequence.num_uncomputed_tokens else [self._whole(sequence)]
        if not taken:
            return []
        self.num_generated_tokens += len(taken)
        update = SequenceUpdate(
            request_id=sequence.request_id,
            token_ids=tuple(token_id for token_id, _ in taken),
            logprobs=tuple(logprobs for _, logprobs in taken if logprobs is not None),
            finish_reason=sequence.end(),
            constrained=sequence.grammar is not None,
            adapter=sequence.request.adapter,
            cached_tokens=sequence.num_cached_tokens,
        )
        if update.finish_reason:
            self._forget(sequence, update.finish_reason)
        return [update]

    def _whole(self, sequence: Sequence) -> SequenceUpdate:
        """Ends a sequence that wants no tokens, with its result."""
        numbers = self._gathering.whole(sequence)
        self._forget(sequence, "stop")
        return SequenceUpdate(
            request_id=sequence.request_id, numbers=numbers, finish_reason="stop", adapter=sequence.request.adapter,
            cached_tokens=sequence.num_cached_tokens,
        )  # fmt: skip

    def _expire(self) -> None:
        now = self.clock()
        for sequence in [s for s in self.sequences.values() if s.deadline is not None and s.deadline <= now]:
            time_s = sequence.request.timeout_s
            over = DeadlineExceeded(f"the request's time of {time_s:g} s is over after {sequence.progress}")
            self._end(sequence, "error", over)

    def _end(self, sequence: Sequence, reason: FinishReason, error: ClusterError | None = None) -> None:
        self._forget(sequence, reason)
        self._unreturned.append(SequenceUpdate(request_id=sequence.request_id, finish_reason=reason, error=error))

    def _forget(self, sequence: Sequence, reason: FinishReason) -> None:
        self._retry_hint.ended(self.clock())
        if not self.compiling.remove(sequence):
            self.scheduler.remove(sequence)
        self._gathering.forget(sequence)
        del self.sequences[sequence.request_id]
        self.metrics.finished(reason)
