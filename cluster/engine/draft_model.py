"""Drafts by a small model beside the large one, with a KV cache of its own. Knows no checkpoint.

The small model goes on with each sequence as an engine of it would: it chooses by the same parameters, seed and
position, so where both models are near each other they draw the same token.
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile

from cluster.engine.block_manager import BlockManager
from cluster.engine.sequence import Sequence
from cluster.engine.step import Batch, Runner, ScheduledSequence
from cluster.model.penalties import PenaltyState

FORGET = 0.98  # of what is known of a sequence's drafts, for each step without: in some 100 steps it is tried again


@dataclass(slots=True, eq=False)
class _Mirror:
    """A sequence as the small model knows it: beyond `num_known` tokens may stand some that it guessed.

    draft: of this step.
    """

    sequence: Sequence
    num_known: int
    draft: list[int]


class DraftModel:
    """A `Drafter`. runner, blocks: of the small model.

    A mirror keeps its blocks until others need them: nobody tells of a sequence's end.
    max_rows: of a step.  max_model_len: tokens of the small model's context.  max_mirrors: sequences at a time.
    """

    prior = 0.6  # high enough that a sequence's first drafts are tried, which tell more

    def __init__(
        self, runner: Runner, blocks: BlockManager, *, max_rows: int, max_model_len: int, max_mirrors: int
    ) -> None:
        self.runner = runner
        self.blocks = blocks
        self.steady = True
        self._max_rows = max_rows
        self._max_model_len = max_model_len
        self._max_mirrors = max_mirrors
        self._mirrors: OrderedDict[Sequence, _Mirror] = OrderedDict()  # the one used last comes last

    def offers(self, sequences: Seq[Sequence], rooms: Seq[int]) -> list[int]:
        """As `Drafter.offers`."""
        longest = min(self._max_model_len, self.blocks.max_tokens)
        return [max(0, min(n, longest - len(s.token_ids))) for s, n in zip(sequences, rooms, strict=True)]

    def drafts(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[tuple[int, ...]]:
        """As `Drafter.drafts`. A sequence of which the small model lacks more tokens than fit a step gets its draft in
        a later one."""
        wanted = {self._mirror(s): n for s, n in zip(sequences, lengths, strict=True) if n}
        self.steady = all(m.sequence.num_uncomputed_tokens <= n + 1 for m, n in wanted.items())
        for sequence, length in zip(sequences, lengths, strict=True):
            if not length:
                sequence.drafting.acceptance.fade(FORGET)
        going = list(wanted)
        while going:
            scheduled = self._scheduled(going, wanted)
            if not scheduled:
                break
            result = self.runner.run(Batch(tuple(scheduled.values())))
            going = []
            for (mirror, part), tokens in zip(scheduled.items(), result.tokens, strict=True):
                if tokens:
                    mirror.sequence.num_computed_tokens += part.num_tokens
                    mirror.draft.append(tokens[0][0])
                    mirror.sequence.token_ids.append(tokens[0][0])
                    if len(mirror.draft) < wanted[mirror]:
                        going.append(mirror)
                elif not part.samples:
                    mirror.sequence.num_computed_tokens += part.num_tokens
        found = {mirror: tuple(mirror.draft) for mirror in wanted}
        return [found.get(self._mirrors[s], ()) if n else () for s, n in zip(sequences, lengths, strict=True)]

    def _mirror(self, sequence: Sequence) -> _Mirror:
        """The sequence's, with the tokens that it has now."""
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            mirror = self._mirrors[sequence] = self._made(sequence)
            while len(self._mirrors) > self._max_mirrors:
                self._evict(next(iter(self._mirrors)))
        self._mirrors.move_to_end(sequence)
        small, known = mirror.sequence, mirror.num_known
        pairs = zip(small.token_ids[known:], sequence.token_ids[known:], strict=False)
        known += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if known < len(small.token_ids):
            small.penalties = PenaltyState()  # it may have counted tokens that were wrong
        small.token_ids[known:] = sequence.token_ids[known:]
        small.num_computed_tokens = min(small.num_computed_tokens, known, len(small.token_ids) - 1)
        self.blocks.remember(small)
        mirror.num_known, mirror.draft = len(small.token_ids), []
        return mirror

    def _made(self, sequence: Sequence) -> _Mirror:
        small = Sequence(
            request=sequence.request,
            params=sequence.params,
            stop_token_ids=sequence.stop_token_ids,
            arrived_at=0.0,
            deadline=None,
            block_salt=sequence.block_salt,
        )
        small.token_ids = list(sequence.token_ids)
        small.drafting.num_drafted = 1  # as a sequence with drafts it leaves keys behind that are wrong
        self.blocks.reuse(small)
        return _Mirror(small, len(small.token_ids), [])

    def _scheduled(self, going: Iterable[_Mirror], kept: Iterable[_Mirror]) -> dict[_Mirror, ScheduledSequence]:
        """The parts of a step, those that lack least first; without those for which there is no room."""
        budget, parts = self._max_rows, {}
        for mirror in sorted(going, key=lambda m: m.sequence.num_uncomputed_tokens):
            small = mirror.sequence
            num_tokens = min(small.num_uncomputed_tokens, budget)
            if num_tokens and self._allocate(small, small.num_computed_tokens + num_tokens, kept):
                parts[mirror] = ScheduledSequence(small, num_tokens)
                budget -= num_tokens
        return parts

    def _allocate(self, small: Sequence, num_tokens: int, kept: Iterable[_Mirror]) -> bool:
        """Takes blocks of mirrors that this step does not need, the longest unused first."""
        spared = set(kept)
        while not self.blocks.allocate(small, num_tokens):
            unused = next((s for s, mirror in self._mirrors.items() if mirror not in spared), None)
            if unused is None:
                return False
            self._evict(unused)
        return True

    def _evict(self, sequence: Sequence) -> None:
        self.blocks.free(self._mirrors.pop(sequence).sequence)
