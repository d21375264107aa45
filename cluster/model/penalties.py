"""Counts the tokens of a sequence, for its penalties. Knows no logits."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cluster.kernels.sampling.rule import Ids


class PenaltyState:
    """The distinct tokens of one sequence and how often each stands in its output; grows by one token a step.

    ids, counts: [N] int32 of the same order, views of memory that grows.
    """

    __slots__ = ("_memory", "_slots", "num_seen")

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # the place of each token
        self._memory = np.zeros((2, 16), dtype=np.int32)  # ids and counts
        self.num_seen = 0

    @property
    def ids(self) -> Ids:
        return self._memory[0, : len(self._slots)]

    @property
    def counts(self) -> Ids:
        return self._memory[1, : len(self._slots)]

    def extend(self, token_ids: Sequence[int], num_prompt_tokens: int, vocab_size: int) -> None:
        """Takes in the tokens past `num_seen`; those past the prompt count as output. Raises IndexError for an id that
        the vocabulary does not have."""
        seen = self.num_seen
        new = token_ids[seen:]
        fresh = [token_id for token_id in dict.fromkeys(new) if token_id not in self._slots]
        if fresh:
            check_ids(fresh, vocab_size)
            self._append(fresh)
        for token_id, count in Counter(new[max(num_prompt_tokens - seen, 0) :]).items():
            self._memory[1, self._slots[token_id]] += count
        self.num_seen = len(token_ids)

    def ahead(self, token_ids: Sequence[int]) -> tuple[Ids, Ids]:
        """Copies of ids and counts as they are when these output tokens have followed; all are in the vocabulary."""
        fresh = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._slots]
        stop = len(self._slots) + len(fresh)
        slots = dict(zip(fresh, range(len(self._slots), stop), strict=True))
        memory = np.zeros((2, stop), dtype=np.int32)
        memory[:, : len(self._slots)] = self._memory[:, : len(self._slots)]
        memory[0, len(self._slots) :] = fresh
        for token_id in token_ids:
            memory[1, slots[token_id] if token_id in slots else self._slots[token_id]] += 1
        return memory[0], memory[1]

    def _append(self, fresh: Sequence[int]) -> None:
        first = len(self._slots)
        stop = first + len(fresh)
        if stop > self._memory.shape[1]:
            grown = np.zeros((2, 2 * stop), dtype=np.int32)
            grown[:, :first] = self._memory[:, :first]
            self._memory = grown
        self._memory[0, first:stop] = fresh
        self._slots.update(zip(fresh, range(first, stop), strict=True))


def check_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises IndexError for the first that is not in the vocabulary: a kernel would read past a row."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise IndexError(f"token {token_id} is not in the vocabulary, which ends at {vocab_size - 1}")
