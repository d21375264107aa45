"""Rank 0's side of a model that is divided among ranks: it alone plans steps, and tells the others each one.

T: rows of a step, H: hidden size, V: vocabulary, v: a rank's part of it.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.config import ModelConfig
from cluster.config.tensor_parallel import Share, shares_of
from cluster.engine.divided_adapters import ToldAdapters
from cluster.engine.group import Group
from cluster.engine.step_inputs import StepArrays
from cluster.model.adapters import StepAdapters
from cluster.model.ranks import HeadAdapters, PartLogits

STOP, STEP, LOGITS, FORGET = range(4)


class Leads(Protocol):
    """As `Leader`, for the runner."""

    def begin(
        self,
        parts: Sequence[StepArrays],
        tails: Sequence[Sequence[np.ndarray]],
        adapters: Sequence[StepAdapters | None],
    ) -> None: ...

    def settle(self) -> None: ...

    def check(self) -> None: ...


class Leader:
    """The `Ranks` of rank 0. Used by one thread.

    A step that ends in the middle here, because all of its sequences lost their experts or met an exception, goes on at
    the other ranks, which know nothing of that: `settle` takes part in the sums that are left, with zeros. The
    keys and values that they write then are written again, or never read.
    """

    def __init__(self, group: Group, config: ModelConfig, dtype: torch.dtype) -> None:
        """config: of the whole model.  dtype: of its hidden states."""
        self.adapters = ToldAdapters(group.changes)
        shares = shares_of(config, group.size)
        self.share: Share = shares[0]
        self._group = group
        self._widths = [len(share.tokens) for share in shares]
        self._hidden_size, self._num_layers, self._dtype = config.hidden_size, config.num_hidden_layers, dtype
        self._left: deque[int] = deque()  # of the step under way: the rows of each sum to come

    def begin(
        self,
        parts: Sequence[StepArrays],
        tails: Sequence[Sequence[np.ndarray]],
        adapters: Sequence[StepAdapters | None],
    ) -> None:
        """Tells the ranks a step's micro-batches. tails: the slots that each clears before, of each group of layers.
        adapters: of each."""
        if gone := self.adapters.take_gone():
            self._group.tell(np.array([FORGET, *gone]))
        arrays = []
        for part, slots, of_part in zip(parts, tails, adapters, strict=True):
            arrays += [self.adapters.packed(of_part), *part.arrays(), *slots]
        self._group.tell(np.concatenate([np.array([STEP, len(parts)]), packed(arrays)]))
        rows = [len(part.token_ids) for part in parts]
        self._left = deque(np.repeat(rows, 2).tolist() * self._num_layers + rows)  # as `CausalLM.forward` calls

    def sum(self, x: Tensor) -> Tensor:
        """As `Ranks.sum`."""
        assert self._left, "a step begins before its sums"
        assert self._left[0] == len(x)
        total = self._group.sum(x)
        self._left.popleft()
        return total

    def settle(self) -> None:
        """After a step, however it ended. Raises Unavailable where a rank is gone now."""
        left, self._left = self._left, deque()
        if self._group.lost is None:
            for num_rows in left:
                self._group.sum(torch.zeros(num_rows, self._hidden_size, dtype=self._dtype, device=self._group.device))

    def logits(self, hidden_states: Tensor, adapters: HeadAdapters | None, part: PartLogits) -> Tensor:
        """As `Ranks.logits`."""
        assert adapters is None or isinstance(adapters, StepAdapters)
        self._group.tell(np.array([LOGITS, len(hidden_states), *self.adapters.packed(adapters).ravel()]))
        try:
            hidden_states = self._group.share(hidden_states)
            parts = [part(hidden_states, adapters)]  # [T, v]
            for rank, width in enumerate(self._widths[1:], 1):
                parts.append(self._group.receive(parts[0].new_empty(len(hidden_states), width), rank))
        except BaseException as error:
            self._group.give_up(error)
            raise
        return torch.cat(parts, dim=1)

    def least(self, counts: Sequence[int]) -> tuple[int, ...]:
        """As `Group.least`."""
        return self._group.least(counts)

    def check(self) -> None:
        """Raises Unavailable once a rank is gone: only a new process can go on."""
        self._group.check()

    def close(self) -> None:
        """Ends the others' waiting for steps."""
        if self._group.lost is None:
            self._group.tell(np.array([STOP]))
            self.adapters.close()


def packed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """int64 arrays as one, each behind its shape."""
    pieces = [np.array([len(arrays)])]
    for array in arrays:
        pieces += [np.array([array.ndim, *array.shape]), array.ravel()]
    return np.concatenate(pieces)


def unpacked(flat: np.ndarray) -> list[np.ndarray]:
    """The arrays of `packed`."""
    found, place = [], 1
    for _ in range(int(flat[0])):
        stop = place + 1 + int(flat[place])
        shape = tuple(flat[place + 1 : stop].tolist())
        place = stop + int(np.prod(shape, dtype=np.int64))
        found.append(flat[stop:place].reshape(shape))
    return found
