"""A rank's part of rounded matrices: bit for bit the weights that one process has. Knows no layers and no files.

A scale depends on numbers that other ranks have: of a row, with nf4 of the whole matrix. So each rank reads the whole,
rounds it, and keeps its part. N: outputs, K: inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.config.quantization import Quantization, RowLayout
from cluster.config.tensor_parallel import Span
from cluster.kernels import nf4, rounding
from cluster.kernels.large_pages import CPU
from cluster.kernels.quantized import QuantizedWeight, new_rows
from cluster.kernels.stored import ALIGNMENT, quantized_weight
from cluster.kernels.weights import Parts

_ROWS = 512  # that are cut at a time: their unpacked numbers take a byte each meanwhile

PartSpans = Mapping[str, Span | None]
"""Of each matrix, by its name, the outputs (dim 0) or inputs (dim 1) that are this rank's; None for all."""


class PartWeight(QuantizedWeight):
    """Parts of matrices, one above another. The whole ones are in memory between `targets` and `settle` alone."""

    def __init__(
        self, num_outputs: int, num_inputs: int, *, parts: Parts, spans: PartSpans, quantization: Quantization,
        dtype: torch.dtype, device: torch.device = CPU,
    ) -> None:  # fmt: skip
        """num_outputs, num_inputs, parts: of this rank.  dtype: as of `quantized_weight`."""
        layout = quantization.layout(num_inputs)
        super().__init__(new_rows(num_outputs, layout, device), layout, dtype)
        self._parts, self._spans, self._quantization = parts, spans, quantization
        self.staging_bytes = sum(_aligned(self._whole(name).staging_bytes) for name in parts)
        self._wholes: list[QuantizedWeight] = []

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        assert parts == self._parts
        self._wholes, begin = [self._whole(name) for name in parts], 0
        found: dict[str, Tensor] = {}
        for name, whole in zip(parts, self._wholes, strict=True):
            found |= whole.targets({name: len(whole.matrix)}, staging[begin:])
            begin += _aligned(whole.staging_bytes)
        return found

    def settle(self) -> None:
        places = torch.split(self.matrix, list(self._parts.values()))
        for place, span in zip(places, self._spans.values(), strict=True):
            whole = self._wholes.pop(0)
            whole.settle()
            _keep(place, whole, self.layout, span)

    def dequantized(self) -> Tensor:
        return nf4.unpacked(self.matrix.cpu(), self.layout) if self.layout.is_nf4 else super().dequantized()

    def _whole(self, name: str) -> QuantizedWeight:
        span, part = self._spans[name], (self._parts[name], self.num_inputs)
        num_outputs, num_inputs = part if span is None else span.whole(part)
        return quantized_weight(num_outputs, num_inputs, quantization=self._quantization, dtype=self._dtype)


def _keep(place: Tensor, whole: QuantizedWeight, layout: RowLayout, span: Span | None) -> None:
    """Fills place, [N, row_bytes] uint8 of `layout`."""
    if span is None or span.dim == 0:
        first = 0 if span is None else span.first
        place.copy_(whole.matrix[first : first + len(place)])
        return
    part_of = nf4.part_of if layout.is_nf4 else rounding.part_of
    for rows, of_whole in zip(torch.split(place, _ROWS), torch.split(whole.matrix, _ROWS), strict=True):
        rows.copy_(part_of(of_whole, whole.layout, range(span.first, span.first + layout.num_inputs)))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
