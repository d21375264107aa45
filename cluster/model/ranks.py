"""How a model that is divided among ranks reaches the others (`cluster/config/tensor_parallel.py`). Knows no processes.

All ranks call the same methods in the same order. T: rows, H: hidden size, V: vocabulary, v: a rank's part of it.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from cluster.config.tensor_parallel import Share


class HeadAdapters(Protocol):
    def add_logits(self, x: Tensor, out: Tensor) -> None:
        """Adds to `out` [T, V], or a rank's [T, v], the logits of x [T, H], in place."""


PartLogits = Callable[[Tensor, HeadAdapters | None], Tensor]


class Ranks(Protocol):
    """As one of them sees them. Each method blocks, and raises Unavailable where a rank is gone."""

    @property
    def share(self) -> Share:
        """This rank's part."""

    def sum(self, x: Tensor) -> Tensor:
        """Adds up the ranks' x, alike in shape, in place: the same numbers at each rank, bit for bit."""

    def logits(self, hidden_states: Tensor, adapters: HeadAdapters | None, part: PartLogits) -> Tensor:
        """[T, H] -> [T, V] at rank 0, which alone has hidden states.

        adapters: that change the head for some of the rows.  part: computes [T, v], this rank's."""
