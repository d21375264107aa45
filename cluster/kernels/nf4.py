"""Weights in nf4 with scales that are rounded themselves, bit for bit as bitsandbytes' quantize_4bit does it on a CPU
with compress_statistics. The plain definition of native/nf4.inc. Knows neither layers nor files.

A weight is one of 16 levels times its block's scale; a block is 64 weights, row after row. A scale less the mean of all
is one of 256 numbers times a nested scale, which 256 of them share. N: outputs, K: inputs, B: blocks of a row.
Source: QLoRA (arXiv 2305.14314), sections 2 and 3; bitsandbytes 0.50, backends/default/ops.py and csrc/cpu_ops.cpp.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config.quantization import HEAD_BYTES, NF4_BLOCK, NF4_NESTED, RowLayout
from cluster.kernels.native.library import DTYPES, Native, native
from cluster.kernels.nf4_numbers import LEVELS, dynamic_map
from cluster.kernels.quantized import QuantizedWeight, filling
from cluster.kernels.rounding import nibbles_of, pack_nibbles, unpack_nibbles
from cluster.kernels.weights import Parts

_STEPS = 65_535  # from -1 to 1, to which bitsandbytes' CPU code rounds a scale before it looks for the nearest number


class Nf4(NamedTuple):
    """numbers: [N, K] uint8, indices of LEVELS.  scales: [N, B] uint8, indices of `dynamic_map`.

    nested: [N B / 256, rounded up] float32.  offset: [] float32, NaN for a matrix that was not finite.
    """

    numbers: Tensor
    scales: Tensor
    nested: Tensor
    offset: Tensor


@cache
def _nearest_scale() -> Tensor:
    """For each of the steps from -1 to 1 the index of the nearest number."""
    numbers = dynamic_map()
    steps = torch.arange(_STEPS + 1, dtype=torch.float32) / _STEPS * 2 - 1
    return torch.bucketize(steps, (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)


def quantize(matrix: Tensor) -> Nf4:
    """matrix: [N, K], K a multiple of 64.

    The mean of the scales is torch's: its last bit may depend on the number of threads, as it does in bitsandbytes.
    """
    num_outputs, num_inputs = matrix.shape
    blocks = matrix.reshape(-1, NF4_BLOCK).float()
    largest = blocks.abs().amax(1)  # [N B]
    levels = torch.tensor(LEVELS)
    scaled = (blocks * (1 / largest.clamp_min(1e-38)).unsqueeze(1)).clamp_(-1, 1)
    numbers = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    scales, nested, offset = _nested(largest.view(num_outputs, -1))
    return Nf4(numbers.view(num_outputs, num_inputs), scales, nested, offset)


def _nested(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the blocks' largest magnitudes, [N, B] float32, an Nf4's scales, nested scales and offset."""
    flat = largest.flatten()
    offset = flat.mean()
    if not bool(flat.isfinite().all()):
        offset, flat = torch.tensor(torch.nan), torch.zeros_like(flat)
    scales, nested = _quantize_scales(flat - offset.nan_to_num())
    return scales.view_as(largest), nested, offset


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """[S] float32 -> indices [S] uint8, and nested scales [S / 256, rounded up] float32."""
    blocks = F.pad(scales, (0, -len(scales) % NF4_NESTED)).view(-1, NF4_NESTED)
    nested = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(nested == 0, 0, 1 / nested)
    steps = ((blocks * inverse).clamp(-1, 1) + 1) * 0.5 * _STEPS + 0.5
    found = torch.where(nested == 0, 0, _nearest_scale()[steps.long()])
    return found.to(torch.uint8).flatten()[: len(scales)], nested.squeeze(1)


def dequantize(nf4: Nf4) -> Tensor:
    """[N, K] float32."""
    nested = nf4.nested.repeat_interleave(NF4_NESTED)[: nf4.scales.numel()].view_as(nf4.scales)
    return _dequantized(nf4.numbers, dynamic_map()[nf4.scales.long()] * nested + nf4.offset)


def _dequantized(numbers: Tensor, scales: Tensor) -> Tensor:
    levels = torch.tensor(LEVELS)[numbers.long()]
    return (levels.view(len(numbers), -1, NF4_BLOCK) * scales.unsqueeze(2)).flatten(1)


def pack(nf4: Nf4, layout: RowLayout) -> Tensor:
    """Returns [N, row_bytes] uint8."""
    rows = torch.zeros(len(nf4.numbers), layout.row_bytes, dtype=torch.uint8)
    _pack_scales(rows, layout, nf4.scales, nf4.nested, nf4.offset)
    spare = 2 * layout.num_chunks * NF4_BLOCK - layout.num_inputs
    rows[:, layout.weights_at :] = pack_nibbles(F.pad(nf4.numbers, (0, spare)))
    return rows


def _pack_scales(rows: Tensor, layout: RowLayout, scales: Tensor, nested: Tensor, offset: Tensor) -> None:
    """All of the rows but their weights."""
    num_rows, num_blocks = scales.shape
    rows[:, : layout.weights_at] = 0
    rows[:, :4] = torch.where(offset.isnan(), torch.nan, 1.0).view(1).view(torch.uint8)
    begins = torch.arange(num_rows) * num_blocks  # of each row's blocks among all
    num_first = NF4_NESTED - begins % NF4_NESTED
    rows[:, 6:8] = num_first.to(torch.int16).unsqueeze(1).view(torch.uint8)
    rows[:, 8:12] = offset.nan_to_num().view(1).view(torch.uint8)
    which = (begins // NF4_NESTED).unsqueeze(1) + torch.arange(layout.num_nested)
    scales_at = HEAD_BYTES + 4 * (1 + layout.num_nested)
    rows[:, 12:scales_at] = nested[which.clamp_max(len(nested) - 1)].view(torch.uint8)
    rows[:, scales_at : scales_at + num_blocks] = scales


def fill_rows(rows: Tensor, matrix: Tensor, layout: RowLayout, kernels: Native | None) -> None:
    """Rounds a matrix [N, K] to its rows, [N, row_bytes] uint8."""
    if kernels is None:
        rows.copy_(pack(quantize(matrix), layout))
        return
    num_outputs, num_inputs = matrix.shape
    largest = torch.empty(num_outputs, num_inputs // NF4_BLOCK)
    kernels.quantize_nf4(
        DTYPES[matrix.dtype], matrix.data_ptr(), matrix.stride(0), rows[:, layout.weights_at :].data_ptr(),
        rows.stride(0), largest.data_ptr(), num_outputs, num_inputs, torch.get_num_threads(),
    )  # fmt: skip
    _pack_scales(rows, layout, *_nested(largest))


def unpacked(rows: Tensor, layout: RowLayout) -> Tensor:
    """The matrix that rows mean, [N, K] float32."""
    num_blocks = layout.num_inputs // NF4_BLOCK
    scales_at = HEAD_BYTES + 4 * (1 + layout.num_nested)
    floats = rows[:, HEAD_BYTES:scales_at].contiguous().view(torch.float32)
    num_first = rows[:, 6:8].contiguous().view(torch.int16)
    later = torch.arange(num_blocks) - num_first
    which = torch.where(later < 0, 0, 1 + later.div(NF4_NESTED, rounding_mode="floor"))
    scales = dynamic_map()[rows[:, scales_at : scales_at + num_blocks].long()]
    scales = scales * floats[:, 1:].gather(1, which) + floats[:, :1]
    numbers = unpack_nibbles(rows[:, layout.weights_at :])[:, : layout.num_inputs]
    return _dequantized(numbers, scales) * rows[:, :4].contiguous().view(torch.float32)


def part_of(rows: Tensor, layout: RowLayout, inputs: range) -> Tensor:
    """The rows [N, row_bytes of fewer inputs] of some inputs alone. A block begins with the first of them."""
    part = replace(layout, num_inputs=len(inputs))
    first, num_blocks = inputs.start // NF4_BLOCK, part.num_inputs // NF4_BLOCK
    assert first * NF4_BLOCK == inputs.start
    found = torch.zeros(len(rows), part.row_bytes, dtype=torch.uint8)
    found[:, :12] = rows[:, :12]
    # Blocks before the first one that has another nested scale; and how many nested scales the first one is past.
    num_first = rows[:, 6:8].contiguous().view(torch.int16) - first  # [N, 1]
    later = (-num_first).div(NF4_NESTED, rounding_mode="floor").add(1).clamp_min(0)
    found[:, 6:8] = (num_first + later * NF4_NESTED).to(torch.int16).view(torch.uint8)
    which = (later + torch.arange(part.num_nested)).clamp_max(layout.num_nested - 1)
    whole_at, scales_at = (HEAD_BYTES + 4 * (1 + each.num_nested) for each in (layout, part))
    nested = rows[:, 12:whole_at].contiguous().view(torch.float32)
    found[:, 12:scales_at] = nested.gather(1, which.long()).view(torch.uint8)
    found[:, scales_at : scales_at + num_blocks] = rows[:, whole_at + first : whole_at + first + num_blocks]
    found[:, part.weights_at :] = nibbles_of(rows[:, layout.weights_at :], inputs)
    return found


class Nf4Weight(QuantizedWeight):
    """Each of its parts is rounded by itself, as a matrix of the checkpoint."""

    def __init__(self, matrix: Tensor, layout: RowLayout, dtype: torch.dtype) -> None:
        super().__init__(matrix, layout, dtype)
        self._parts: Parts = {}

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        self._parts = parts
        return super().targets(parts, staging)

    def settle(self) -> None:
        sizes = list(self._parts.values())
        with filling(self.matrix) as whole:
            for rows, matrix in zip(torch.split(whole, sizes), torch.split(self._staged, sizes), strict=True):
                fill_rows(rows, matrix, self.layout, native())
        self._staged = torch.empty(0)

    def dequantized(self) -> Tensor:
        return unpacked(self.matrix.cpu(), self.layout)
