"""The engine: takes requests, makes steps, reports tokens. Knows no thread, no network and no text.

engine.submit(request); updates = engine.step()      # schedule → run → update
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace

from cluster.config import EngineConfig
from cluster.engine.block_manager import BlockManager
from cluster.engine.fitting import fitting
from cluster.engine.isolation import OnStep, failure_of, prove, run_isolated
from cluster.engine.retry_hint import RetryHint
from cluster.engine.runner import ModelRunner, StepResult
from cluster.engine.scheduler import Batch, ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled
from cluster.metrics import EngineMetrics
from cluster.model.sampler import NoFiniteNumbers, Sampled
from cluster.types import EngineRequest, EngineStats, FinishReason, SequenceUpdate

log = logging.getLogger(__name__)

HOLD_S = 1.0  # a held sequence tries again at the latest after so long: a broken connection brings no news of the plan
HOLD_POLL_S = 0.05  # when all are held the engine looks up so often: a new request may need other experts
MAX_CANCELLED_EARLY = 1024  # ids kept of cancels that found no sequence; most are of finished ones


class Engine:
    """Used by one thread. Every request that `submit` accepts ends in exactly one update with a finish_reason."""

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        num_blocks: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.monotonic,
        seeds: random.Random | None = None,
        on_step: OnStep = lambda _: None,
    ) -> None:
        self.runner = runner
        self.config = config
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.metrics = metrics
        self.clock = clock
        self.seeds = seeds or random.Random()
        self.on_step = on_step
        self.blocks = BlockManager(num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.sequences: dict[str, Sequence] = {}
        self.num_generated_tokens = 0
        self._retry_hint = RetryHint(self.clock())
        self._finished: list[SequenceUpdate] = []
        self._cancelled_early: dict[str, None] = {}
        self._release_at = 0.0  # when held sequences go on, and of which plan they have news before
        self._release_beyond = 0

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._finished)

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        return EngineStats(
            running=len(self.scheduler.running),
            held=sum(sequence.held for sequence in list(self.scheduler.running)),
            waiting=len(self.scheduler.waiting),
            used_blocks=self.blocks.num_used,
            num_blocks=self.blocks.num_blocks,
            generated_tokens=self.num_generated_tokens,
            at=time.time(),
            block_size=self.blocks.block_size,
            max_model_len=self.max_model_len,
        )

    def submit(self, request: EngineRequest) -> None:
        """Queues a request. Raises Overloaded, InvalidRequest, RequestCancelled; then nothing of it is left here."""
        if request.request_id in self._cancelled_early:
            del self._cancelled_early[request.request_id]
            raise RequestCancelled("the request was cancelled before it began")
        if request.request_id in self.sequences:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use by a running request", "request_id")
        params = fitting(request, self.max_model_len, self.blocks.num_blocks * self.blocks.block_size)
        if not request.num_replays and self.scheduler.num_queued >= self.config.max_waiting:
            self._make_room(request.client)
        if params.seed is None:
            params = replace(params, seed=self.seeds.getrandbits(63))
        stop_token_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos_token_ids))
        now = self.clock()
        sequence = Sequence(
            request=request,
            params=params,
            stop_token_ids=frozenset(stop_token_ids),
            arrived_at=now,
            deadline=None if request.timeout_s is None else now + request.timeout_s,
        )
        self.scheduler.add(sequence)
        self.sequences[request.request_id] = sequence
        if request.output_token_ids and (reason := _end_of(sequence)):
            self._end(sequence, reason)  # the earlier attempt got to the end, only its word for it was lost

    def cancel(self, request_id: str) -> None:
        """Stops a sequence and frees its blocks at once.

        An unknown id is no error: it has finished, or its request comes later and then ends as it begins.
        """
        if sequence := self.sequences.get(request_id):
            self._end(sequence, "cancelled")
            return
        self._cancelled_early[request_id] = None
        if len(self._cancelled_early) > MAX_CANCELLED_EARLY:
            del self._cancelled_early[next(iter(self._cancelled_early))]

    def step(self) -> list[SequenceUpdate]:
        """Makes one step and returns what it brought, ends of cancelled and expired sequences included. Blocks.

        A sequence that meets an exception of its own ends with it. Raises what ends them all.
        """
        self._expire()
        self._release()
        batch = self._schedule()
        for _ in range(batch.num_preempted):
            self.metrics.preempted()
        self.metrics.reused(batch.num_reused_tokens)
        updates = self._run(batch) if batch.scheduled else []
        updates += self._finished
        self._finished = []
        held = sum(sequence.held for sequence in self.scheduler.running)
        if held and not batch.scheduled and not updates:
            self.runner.has_news(self._release_beyond, HOLD_POLL_S)
        self.metrics.state(
            len(self.scheduler.running),
            held,
            len(self.scheduler.waiting),
            self.blocks.num_used,
            self.blocks.num_blocks,
        )
        return updates

    def _make_room(self, client: str) -> None:
        """In a full queue the client with the most waiting requests loses its latest. Raises Overloaded if that is
        this one."""
        later_s = self._retry_hint.seconds(self.config.max_waiting)
        limit = self.config.max_waiting
        taken = (
            f"the queue is full ({limit} requests wait)"
            if limit
            else f"all {self.config.max_num_seqs} places are taken"
        )
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
        computed = [s for i, s in enumerate(batch.scheduled) if i not in result.lost and i not in result.failed]
        num_decode_tokens = sum(s.num_tokens for s in computed if s.samples and s.sequence.num_output_tokens)
        num_prefill_tokens = sum(s.num_tokens for s in computed) - num_decode_tokens
        self.metrics.step(self.clock() - started, num_prefill_tokens, num_decode_tokens, len(batch.scheduled))
        updates = []
        self._hold(result, batch)
        for i, s in enumerate(batch.scheduled):
            if i in result.lost:
                continue
            try:
                if i in result.failed:
                    raise result.failed[i]
                updates += self._advance(s, result.tokens[i])
            except Exception as error:  # noqa: BLE001 it is this sequence's alone
                self._fail(s.sequence, error)
        if len(result.failed) == len(batch.scheduled):
            prove(self.runner, self.blocks, self.on_step)
        return updates

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a sequence that met an exception of its own."""
        if isinstance(error, NoFiniteNumbers):
            self.blocks.disown(sequence)  # what went wrong may have begun before it showed
        self._end(sequence, "error", failure_of(sequence.request.called, error))

    def _hold(self, result: StepResult, batch: Batch) -> None:
        """Sequences that need a lost expert keep their blocks and let the others go on; for too long lost ones end."""
        if not result.lost:
            return
        now = self.clock()
        if not any(sequence.held for sequence in self.scheduler.running):
            self._release_at, self._release_beyond = now + HOLD_S, result.epoch
        for i, error in result.lost.items():
            sequence = batch.scheduled[i].sequence
            if sequence.lost_since is None:
                sequence.lost_since = now
            sequence.held = True
            if now - sequence.lost_since >= self.runner.recovery_timeout_s:
                log.warning("sequence %s ends: %s", sequence.request.called, error)
                self._end(sequence, "error", error)

    def _release(self) -> None:
        """Held sequences go on when the plan has changed, or to see whether it works again."""
        held = [sequence for sequence in self.scheduler.running if sequence.held]
        if held and (self.clock() >= self._release_at or self.runner.has_news(self._release_beyond, 0.0)):
            for sequence in held:
                sequence.held = False

    def _advance(self, scheduled: ScheduledSequence, sampled: Sampled | None) -> list[SequenceUpdate]:
        """Takes in what a step brought one sequence."""
        sequence = scheduled.sequence
        sequence.lost_since = None
        sequence.num_computed_tokens += scheduled.num_tokens
        self.blocks.remember(sequence)
        if sampled is None:
            return []
        token_id, logprobs = sampled
        sequence.token_ids.append(token_id)
        self.num_generated_tokens += 1
        update = SequenceUpdate(
            request_id=sequence.request_id,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=_end_of(sequence),
        )
        if update.finish_reason:
            self._forget(sequence, update.finish_reason)
        return [update]

    def _expire(self) -> None:
        now = self.clock()
        for sequence in [s for s in self.sequences.values() if s.deadline is not None and s.deadline <= now]:
            error = DeadlineExceeded(
                f"the request's time of {sequence.request.timeout_s:g} s is over after "
                f"{sequence.num_output_tokens} of {sequence.params.max_tokens} tokens"
            )
            self._end(sequence, "error", error)

    def _end(self, sequence: Sequence, reason: FinishReason, error: ClusterError | None = None) -> None:
        self._forget(sequence, reason)
        self._finished.append(SequenceUpdate(request_id=sequence.request_id, finish_reason=reason, error=error))

    def _forget(self, sequence: Sequence, reason: FinishReason) -> None:
        self._retry_hint.ended(self.clock())
        self.scheduler.remove(sequence)
        del self.sequences[sequence.request_id]
        self.metrics.finished(reason)


def _end_of(sequence: Sequence) -> FinishReason | None:
    """Why it ends with its last token, if it does."""
    if sequence.token_ids[-1] in sequence.stop_token_ids:
        return "stop"
    return "length" if sequence.num_output_tokens >= (sequence.params.max_tokens or 1) else None
