"""The linear layers of rows that have LoRA adapters. Knows no files and no sequences.

A layer's product is made for all rows as without adapters, so that rows of the base do not change by a bit; then each
adapter's part is added to its own rows. M: rows of an adapter, N: outputs, K: inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels.lora import LowRank

Changes = Mapping[str, LowRank]  # of one layer, by the names of its `Linear`s below `model.layers.N.`


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """The adapters of a micro-batch at one layer: the rows of each, [M] int64, and its changes there. No row is in
    two.  num_rows: of the micro-batch."""

    num_rows: int
    parts: Sequence[tuple[Tensor, Changes]]

    def add(self, name: str, x: Tensor, out: Tensor) -> None:
        """Adds to `out` [T, N], the product of the layer `name` with x [T, K], in place."""
        for rows, changes in self.parts:
            change = changes.get(name)
            if change is not None:
                out.index_add_(0, rows, change.product(x.index_select(0, rows)))

    def of(self, *names: str) -> "LayerAdapters":
        """Only those that change one of these layers."""
        found = [(rows, changes) for rows, changes in self.parts if not changes.keys().isdisjoint(names)]
        return LayerAdapters(self.num_rows, found)

    @property
    def rows(self) -> Tensor:
        """All of them, one adapter's after the other's."""
        return torch.cat([rows for rows, _ in self.parts])

    def gathered(self) -> "LayerAdapters":
        """For the rows `rows` alone, in that order."""
        found, start = [], 0
        for rows, changes in self.parts:
            stop = start + len(rows)
            found.append((torch.arange(start, stop, device=rows.device), changes))
            start = stop
        return LayerAdapters(start, found)
