"""Chooses what each step computes. Knows blocks and tokens as numbers; knows no tensors and no clock.

Sequences that only need their next token come first. Prompts share the rest of the budget, in chunks: short ones
first, but at least half is for the one whose turn it is. Turns go by arrival, among waiting clients by rotation.
A suspect, at which an engine died, is computed alone: if it ends this engine too, no other one is suspected.
"""

from dataclasses import dataclass, field, replace
from itertools import count, takewhile

from cluster.engine.block_manager import BlockManager
from cluster.engine.fair_queue import FairQueue
from cluster.engine.sequence import NO_TURN, Sequence
from cluster.engine.step import Batch, ScheduledSequence


@dataclass(slots=True)
class _Step:
    """A step while it is planned. budget: tokens that are left.  parts: the part of each sequence in it."""

    budget: int
    parts: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    num_preempted: int = 0
    num_reused_tokens: int = 0

    def num_tokens(self, sequence: Sequence) -> int:
        part = self.parts.get(sequence)
        return part.num_tokens if part else 0

    def give(self, part: ScheduledSequence) -> None:
        """Takes a part in; it replaces a smaller one of the same sequence."""
        self.budget -= part.num_tokens - self.num_tokens(part.sequence)
        self.parts[part.sequence] = part

    def take_back(self, victim: Sequence) -> None:
        self.budget += self.num_tokens(victim)
        self.parts.pop(victim, None)
        self.num_preempted += 1

    def batch(self) -> Batch:
        return Batch(tuple(self.parts.values()), self.num_preempted, self.num_reused_tokens)


class Scheduler:
    """Used by one thread. num_ahead: as of `Runner`."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, num_ahead: int = 0
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_ahead = num_ahead
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.planned: Sequence | None = None  # whose turn it is while `schedule` works: an exception is that one's
        self._turns = count()
        self._last_suspect: Sequence | None = None
        self._last_was_alone = False

    @property
    def has_work(self) -> bool:
        return bool(len(self.waiting) or self.running)

    @property
    def num_queued(self) -> int:
        """Waiting sequences that the next step has no place for: a burst that comes between two steps is no queue.
        Below zero: so many places are left."""
        return len(self.waiting) + len(self.running) - self.max_num_seqs

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)

    def schedule(self) -> Batch:
        """Plans one step and allocates its blocks. When blocks run out, the latest arrival gives its blocks up and is
        computed again later (preemption by recompute); a sequence that fits the cache alone always gets on.

        Suspects get every other step at most, in turn.
        """
        suspects = self._suspects()
        if not suspects:
            self._last_was_alone, self._last_suspect = False, None
            return self._schedule(None)
        num_preempted = 0
        for whose in (None, *suspects) if self._last_was_alone else (*suspects, None):
            batch = self._schedule(whose)
            num_preempted += batch.num_preempted
            if batch.scheduled:  # one that finds no room leaves the step to the next one, which may give it some
                break
        self._last_was_alone = whose is not None
        self._last_suspect = whose or self._last_suspect
        return replace(batch, num_preempted=num_preempted)

    def _suspects(self) -> list[Sequence]:
        """The suspects that run or may begin, from the one that comes after the last one."""
        suspects = [sequence for sequence in self.running if sequence.is_suspect and not sequence.held]
        if len(self.waiting) and len(self.running) < self.max_num_seqs and self.waiting.peek().is_suspect:
            suspects.append(self.waiting.peek())
        after = suspects.index(self._last_suspect) + 1 if self._last_suspect in suspects else 0
        return suspects[after:] + suspects[:after]

    def _schedule(self, suspect: Sequence | None) -> Batch:
        """Plans a step of the suspect alone; with None, one of all sequences that are no suspects."""
        step = _Step(self.max_num_batched_tokens)
        prompts: list[Sequence] = []
        for sequence in [s for s in self.running if not s.held and _takes_part(s, suspect)]:
            if sequence.num_uncomputed_tokens > 1:
                prompts.append(sequence)
            else:
                self._go_on(step, sequence, step.budget)
        if step.budget:
            self._share(step, prompts, suspect)
        self.planned = None
        return step.batch()

    def _share(self, step: "_Step", prompts: list[Sequence], suspect: Sequence | None) -> None:
        """Shares the budget that decode rows leave among prompts that run or may begin: the shortest rest first.

        The prompt whose turn it is keeps at least half of it, so N tokens take 2 N / (that budget) steps at most,
        however many shorter ones come.
        """
        waiting = self._may_begin(suspect) if not step.num_preempted else []
        prompts = [sequence for sequence in prompts if sequence in self.running]
        turns = [*prompts, *waiting[:1]]
        if not turns:
            return
        first = min(turns, key=lambda sequence: sequence.turn)
        reserved = min(first.num_uncomputed_tokens, -(-step.budget // 2))
        for sequence in sorted([*prompts, *waiting], key=lambda s: (s.num_uncomputed_tokens, s is not first)):
            if sequence is first:
                reserved = 0
            if sequence not in waiting:
                self._go_on(step, sequence, step.budget - reserved)
            elif self._leaves_room(sequence, waiting):
                self._begin(step, sequence, step.budget - reserved)
        # The share of one that found no room, and the tokens that a found beginning saved.
        for sequence in prompts:
            self._go_on(step, sequence, step.budget)
        for sequence in waiting:
            if sequence not in self.running and not self._begin(step, sequence, step.budget):
                break

    def _may_begin(self, suspect: Sequence | None) -> list[Sequence]:
        """Waiting sequences that have places, in their order; the first one's turn has come."""
        places = self.max_num_seqs - len(self.running)
        waiting = list(takewhile(lambda s: _takes_part(s, suspect), self.waiting.first(places)))
        for sequence in waiting[:1]:
            self._take_turn(sequence)
        return waiting

    def _take_turn(self, sequence: Sequence) -> None:
        if sequence.turn == NO_TURN:
            sequence.turn = next(self._turns)

    def _leaves_room(self, sequence: Sequence, waiting: list[Sequence]) -> bool:
        """Whether it may begin before the one whose turn it is: only if the cache has room for both prompts and for all
        that run. Else short ones could keep a long one out of the cache for ever."""
        first = waiting[0]
        if sequence is first or first in self.running:
            return True
        return self.blocks.have_room_for((first, sequence), self.running)

    def _go_on(self, step: "_Step", sequence: Sequence, limit: int) -> None:
        """Gives a running sequence up to `limit` tokens more. When blocks run out the latest arrival is preempted,
        though it may have a part in this step, or be this one."""
        if sequence not in self.running:
            return
        self.planned = sequence
        granted = step.num_tokens(sequence)
        num_tokens = min(sequence.num_uncomputed_tokens - granted, limit)
        if num_tokens <= 0:
            return
        part = self._part(sequence, granted + num_tokens)
        while (placed := self._allocate(part)) is None:
            victim = self.running[-1]
            step.take_back(victim)
            self._preempt(victim)
            if victim is sequence:
                return
        step.give(placed)

    def _begin(self, step: "_Step", sequence: Sequence, limit: int) -> bool:
        """Lets a waiting sequence run with up to `limit` tokens; false if it has to wait."""
        if limit <= 0 or step.num_preempted:
            return False
        self.planned = sequence
        num_reused = self.blocks.reuse(sequence)
        part = self._allocate(self._part(sequence, min(sequence.num_uncomputed_tokens, limit)))
        if part is None:
            self.blocks.free(sequence)
            sequence.num_computed_tokens = 0
            return False
        self.waiting.take(sequence)
        self._take_turn(sequence)
        self.running.append(sequence)
        if not sequence.started:
            sequence.num_cached_tokens = num_reused
        step.num_reused_tokens += num_reused
        step.give(part)
        return True

    def _part(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Tokens ahead are for a sequence that samples, and for no more tokens than it may still bring: a sequence that
        fits the cache alone still does."""
        part = ScheduledSequence(sequence, num_tokens)
        if not self.num_ahead or not part.samples or sequence.grammar is not None:  # a mask is of one place
            return part
        num_after_next = (sequence.params.max_tokens or 1) - sequence.num_output_tokens - 1
        return replace(part, num_ahead=max(0, min(self.num_ahead, num_after_next)))

    def _allocate(self, part: ScheduledSequence) -> ScheduledSequence | None:
        """The part with its blocks, or without tokens ahead where there is room for no more: they are worth no
        preemption. None: changes nothing."""
        num_tokens = part.sequence.num_computed_tokens + part.num_tokens
        if self.blocks.allocate(part.sequence, num_tokens + part.num_ahead):
            return part
        if part.num_ahead and self.blocks.allocate(part.sequence, num_tokens):
            return replace(part, num_ahead=0)
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.held = False
        sequence.lost_since = None
        self.waiting.put_back(sequence)


def _takes_part(sequence: Sequence, suspect: Sequence | None) -> bool:
    """Whether it may stand in a step of that suspect; with None, in one of all that are no suspects."""
    return sequence is suspect if suspect is not None else not sequence.is_suspect
