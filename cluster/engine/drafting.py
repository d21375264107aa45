"""How far the drafts of one sequence can be trusted: what was right of those before. Knows no model and no clock."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

KEEP = 0.85  # of an observation's weight once another token was observed: the last half dozen decide
PRIOR_WEIGHT = 1.0  # of the share that is taken for granted, in observed tokens


class Acceptance:
    """The share of drafted tokens that are right where those before them in the draft are; late ones weigh most."""

    __slots__ = ("_right", "_total")

    def __init__(self) -> None:
        self._right = self._total = 0.0

    def share(self, prior: float) -> float:
        """In (0, 1), if the prior is. prior: the share before anything was observed."""
        return (self._right + prior * PRIOR_WEIGHT) / (self._total + PRIOR_WEIGHT)

    def observe(self, num_right: int, num_drafted: int) -> None:
        """Of a draft its first `num_right` tokens were right, and the next one, if there is one, was not."""
        num_observed = min(num_right + 1, num_drafted)
        kept = KEEP**num_observed
        self._right = kept * self._right + num_right
        self._total = kept * self._total + num_observed

    def fade(self, kept: float) -> None:
        """Nothing was observed for a step: the weight of what was is multiplied."""
        self._right *= kept
        self._total *= kept


class TokenHistory:
    """A sequence's tokens as an array that grows. Finds where its end has stood before."""

    __slots__ = ("_ids", "_length")

    def __init__(self) -> None:
        self._ids = np.empty(0, dtype=np.int32)
        self._length = 0

    def extend(self, token_ids: list[int]) -> None:
        """token_ids: of the whole sequence; those that are known have not changed."""
        length = len(token_ids)
        if length > len(self._ids):
            grown = np.empty(2 * length, dtype=np.int32)
            grown[: self._length] = self._ids[: self._length]
            self._ids = grown
        self._ids[self._length : length] = token_ids[self._length :]
        self._length = length

    def continuation(self, shortest: int, longest: int, num_tokens: int) -> tuple[int, ...]:
        """The tokens that followed where the last `longest` tokens, or fewer down to `shortest`, stood before: as many
        as possible, at the last such place. Where that place touches the end it goes on over the copy, so a text that
        repeats itself is repeated on.

        Source: Saxena, Prompt Lookup Decoding (2023); the overlapping copy is LZ77's.
        """
        ids = self._ids[: self._length]
        places = self._places(ids, shortest, longest)
        if not len(places):
            return ()
        copied = ids[places[-1] : places[-1] + num_tokens].tolist()
        period = len(ids) - int(places[-1])
        while len(copied) < num_tokens:
            copied.append(copied[len(copied) - period])
        return tuple(copied)

    def _places(self, ids: NDArray[np.int32], shortest: int, longest: int) -> NDArray[np.int64]:
        """Where the tokens after the longest match begin; none where it is shorter than `shortest`."""
        length = len(ids)
        if length <= shortest:
            return np.empty(0, dtype=np.int64)
        places = np.flatnonzero(ids[:-1] == ids[-1]) + 1
        for num_matched in range(2, min(longest, length - 1) + 1):
            longer = places[places >= num_matched]
            longer = longer[ids[longer - num_matched] == ids[length - num_matched]]
            if not len(longer):
                return places if num_matched > shortest else longer
            places = longer
        return places


@dataclass(slots=True)
class Drafting:
    """Of one sequence.

    num_drafted: tokens that steps have tried.  expected: a drafted token that no step tries, and its position: it shows
    for nothing whether it was right.  offered: its next tokens, as far as they are drafted.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    history: TokenHistory = field(default_factory=TokenHistory)
    num_drafted: int = 0
    expected: tuple[int, int] | None = None
    offered: tuple[int, ...] = ()
