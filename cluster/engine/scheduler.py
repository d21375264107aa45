"""Chooses what each step computes. Knows blocks and tokens as numbers; knows no tensors and no clock.

Running sequences come first, in the order of their arrival, then waiting ones, clients in rotation; each gets as many
of its uncomputed tokens as the budget leaves, so prompts are computed in chunks beside the decode rows of others.
A suspect, at which an engine died, has a step of its own: if it ends this engine too, no other one is suspected.
"""

from dataclasses import dataclass, replace

from cluster.engine.block_manager import BlockManager
from cluster.engine.fair_queue import FairQueue
from cluster.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its uncomputed tokens this step computes (at least one)."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether its last token is computed, so that a new one is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. num_preempted: sequences that lost their blocks to make it possible.
    num_reused_tokens: tokens of sequences that begin here and whose keys and values were in the cache."""

    scheduled: tuple[ScheduledSequence, ...]
    num_preempted: int = 0
    num_reused_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


class Scheduler:
    """Used by one thread."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.planned: Sequence | None = None  # whose turn it is while `schedule` works: an exception is that one's
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
        """Plans one step and allocates its blocks. When blocks run out, the latest arrival gives its own up and is
        computed again later (preemption by recompute); a sequence that fits the cache alone always gets on.

        Suspects get every other step at most, in turn.
        """
        suspect = self._next_suspect()
        if suspect is None:
            self._last_was_alone, self._last_suspect = False, None
            return self._schedule(None)
        num_preempted = 0
        for whose in (None, suspect) if self._last_was_alone else (suspect, None):
            batch = self._schedule(whose)
            num_preempted += batch.num_preempted
            if batch.scheduled:
                break
        self._last_was_alone = whose is not None
        self._last_suspect = whose or self._last_suspect
        return replace(batch, num_preempted=num_preempted)

    def _next_suspect(self) -> Sequence | None:
        """The one that comes after the last one, of those that run or may begin."""
        suspects = [sequence for sequence in self.running if sequence.is_suspect and not sequence.held]
        if len(self.waiting) and len(self.running) < self.max_num_seqs and self.waiting.peek().is_suspect:
            suspects.append(self.waiting.peek())
        after = suspects.index(self._last_suspect) + 1 if self._last_suspect in suspects else 0
        return suspects[after % len(suspects)] if suspects else None

    def _schedule(self, suspect: Sequence | None) -> Batch:
        """A step of the suspect alone, or with None one of all that are none."""
        scheduled: list[ScheduledSequence] = []
        budget = self.max_num_batched_tokens
        num_preempted = num_reused_tokens = 0
        position = 0
        while position < len(self.running) and budget:
            sequence = self.running[position]
            if sequence.held or not _takes_part(sequence, suspect):
                position += 1
                continue
            self.planned = sequence
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self.blocks.allocate(sequence, sequence.num_computed_tokens + num_tokens):
                victim = self.running[-1]
                self._preempt(victim)
                num_preempted += 1
                if victim is sequence:
                    break
            else:
                scheduled.append(ScheduledSequence(sequence, num_tokens))
                budget -= num_tokens
            position += 1
        while len(self.waiting) and budget and len(self.running) < self.max_num_seqs and not num_preempted:
            sequence = self.waiting.peek()
            if not _takes_part(sequence, suspect):
                break
            self.planned = sequence
            num_reused = self.blocks.reuse(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if not self.blocks.allocate(sequence, num_reused + num_tokens):
                self.blocks.free(sequence)
                sequence.num_computed_tokens = 0
                break
            num_reused_tokens += num_reused
            self.waiting.pop()
            self.running.append(sequence)
            scheduled.append(ScheduledSequence(sequence, num_tokens))
            budget -= num_tokens
        self.planned = None
        return Batch(tuple(scheduled), num_preempted, num_reused_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.held = False
        sequence.lost_since = None
        self.waiting.put_back(sequence)


def _takes_part(sequence: Sequence, suspect: Sequence | None) -> bool:
    """Whether it may stand in a step of that suspect, or with None in one of all that are none."""
    return sequence is suspect if suspect is not None else not sequence.is_suspect
