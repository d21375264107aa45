"""Drafts from the sequence itself: what followed its last tokens where they stood before. Knows no model."""

from collections.abc import Sequence as Seq

from cluster.engine.sequence import Sequence


class PromptLookup:
    """A `Drafter` that costs a search of some microseconds. So it looks at each step, and learns from what comes
    whether a draft would have been right, without trying it.

    shortest, longest: tokens of the end that must have stood before, that are looked for.
    """

    steady = True
    prior = 0.3  # a lone match in a text without repetition is right less often, in one with it far more often

    def __init__(self, *, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest

    def offers(self, sequences: Seq[Sequence], rooms: Seq[int]) -> list[int]:
        """As `Drafter.offers`."""
        for sequence, room in zip(sequences, rooms, strict=True):
            drafting = sequence.drafting
            if drafting.expected is not None and drafting.expected[0] < len(sequence.token_ids):
                position, token_id = drafting.expected
                drafting.acceptance.observe(int(sequence.token_ids[position] == token_id), 1)
                drafting.expected = None
            drafting.offered = ()
            if room:
                drafting.history.extend(sequence.token_ids)
                drafting.offered = drafting.history.continuation(self._shortest, self._longest, room)
        return [len(sequence.drafting.offered) for sequence in sequences]

    def drafts(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[tuple[int, ...]]:
        """As `Drafter.drafts`."""
        found = []
        for sequence, length in zip(sequences, lengths, strict=True):
            offered = sequence.drafting.offered
            found.append(offered[:length])
            sequence.drafting.expected = (len(sequence.token_ids), offered[0]) if offered and not length else None
        return found
