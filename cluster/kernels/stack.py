"""Matrices of several experts side by side in memory, as a GPU has them. Knows no products and no forms of weights.

L: experts, N: outputs, K: inputs, J: matrices one above another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cluster.config.quantization import RowLayout


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices in 8 or 4 bits. rows: [L, N, row_bytes] uint8, of `layout`.

    orders: [L, J, K] int32, of each of an expert's matrices the input that comes first, second, …; None for their own.
    """

    rows: Tensor
    layout: RowLayout
    orders: Tensor | None = None

    def rearranged(self, places: Sequence[int | None]) -> "Stack":
        """As of `ExpertWeights`."""
        orders = None if self.orders is None else rearranged(self.orders, places)
        return Stack(rearranged(self.rows, places), self.layout, orders)


def rearranged(stack: Tensor, places: Sequence[int | None]) -> Tensor:
    """A copy [L, …] with each of `places` in its turn, and nothing yet where one is None."""
    other = stack.new_empty(len(places), *stack.shape[1:])
    for i, place in enumerate(places):
        if place is not None:
            other[i] = stack[place]
    return other
