"""Products of low rank beside a weight's: what a LoRA adapter adds to layers. Knows no layer and no sequence.

M: rows, N: outputs, K: inputs, r: rank, H: hidden size, I: intermediate size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels.weights import MakeWeight, Weight


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the matrices that a `Linear` stands for. ranks: its rows of the product with A.  b: [outputs, r]."""

    ranks: slice
    outputs: slice
    b: Weight


class LowRank:
    """One adapter's change of one `Linear`: B (A x) for each of its parts that the adapter has.

    changes: A [r, K] and B [outputs, r] with the factor in it, of each changed part by its name.
    outputs: of all parts, in the layer's order.
    """

    def __init__(
        self, changes: Mapping[str, tuple[Tensor, Tensor]], outputs: Mapping[str, int], make: MakeWeight
    ) -> None:
        self._num_outputs = sum(outputs.values())
        self._is_whole = outputs.keys() <= changes.keys()
        self._parts: list[_Part] = []
        rank = start = 0
        for name, size in outputs.items():
            if name in changes:
                b = changes[name][1]
                ranks = slice(rank, rank := rank + b.shape[1])
                self._parts.append(_Part(ranks, slice(start, start + size), filled(make, b)))
            start += size
        self._a = filled(make, torch.cat([changes[name][0] for name in outputs if name in changes]))

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + sum(part.b.nbytes for part in self._parts)

    def product(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N], zero where nothing is changed."""
        inner = self._a.product(x)  # [M, all r]
        out = (
            x.new_empty(x.shape[0], self._num_outputs) if self._is_whole else x.new_zeros(x.shape[0], self._num_outputs)
        )
        for part in self._parts:
            out[:, part.outputs] = part.b.product(inner[:, part.ranks])
        return out


class LowRankRows:
    """One adapter's change of an embedding: B A[:, id] for each id.

    a: [r, ids].  b: [outputs, r] with the factor in it.  like: the embedding's rows, for dtype and device.
    """

    def __init__(self, a: Tensor, b: Tensor, like: Tensor, make: MakeWeight) -> None:
        self._rows = a.T.to(like.device, like.dtype).contiguous()
        self._b = filled(make, b)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._b.nbytes

    def product(self, ids: Tensor) -> Tensor:
        """[M] int64 -> [M, outputs]."""
        return self._b.product(self._rows[ids])


def filled(make: MakeWeight, matrix: Tensor) -> Weight:
    """A weight of the form that `make` makes, with a matrix's numbers."""
    weight = make(*matrix.shape)
    staging = torch.empty(weight.staging_bytes, dtype=torch.uint8)
    for target in weight.targets({"": matrix.shape[0]}, staging).values():
        target.copy_(matrix)
    weight.settle()
    return weight
