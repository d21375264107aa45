"""How matrices are rounded to 8 and 4 bits, and how their rows lie in memory. The plain definition of
native/quantized_rows.inc and quantize.inc. Knows no products.

With 8 bits a row has one scale, or groups in a matrix that comes so; with 4 bits each group of 32, 64 or 128 inputs has
one, and a zero where they are not symmetric. N: outputs, K: inputs, G: groups of a row.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config.quantization import CHUNK_INPUTS, HEAD_BYTES, RowLayout
from cluster.config.stored import GROUP_SIZES


class Numbers(NamedTuple):
    """A matrix [N, K] is (numbers - zeros) * scales * factors, a group's scale and zero for each of its inputs.

    numbers: [N, K] int8, of 4 bits -8 to 7.  scales: [N, G] float16.  zeros: [N, G] int8.  factors: [N] float32.
    With 8 bits there are no zeros, and scales in groups alone. A row of factor NaN was not finite.
    """

    numbers: Tensor
    factors: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


def quantize(matrix: Tensor, layout: RowLayout) -> Numbers:
    """Rounds each number of a matrix [N, K] to the nearest that its row or group can have."""
    matrix = matrix.float()
    is_finite = matrix.isfinite().all(dim=1, keepdim=True)
    matrix = matrix.where(is_finite, 0.0)
    if layout.num_bits == 8:
        factors = matrix.abs().amax(dim=1, keepdim=True) / 127  # [N, 1]
        numbers = _rounded(matrix, factors).clamp(-127, 127)
        return Numbers(numbers.to(torch.int8), factors.where(is_finite, torch.nan).squeeze(1))
    groups = F.pad(matrix, (0, -matrix.shape[1] % layout.group_size))
    groups = groups.view(len(matrix), -1, layout.group_size)
    lowest, highest = groups.amin(dim=2), groups.amax(dim=2)  # [N, G]
    if layout.has_zeros:
        lowest, highest = lowest.clamp_max(0), highest.clamp_min(0)  # so that a zero is among the 16
        scales = (highest - lowest) / 15
    else:
        # -8 is the number farthest from 0: the group's largest magnitude gets it, whatever its sign.
        scales = torch.where(highest > -lowest, highest, lowest) / -8 + 0.0  # a zero without a sign
    largest = scales.abs().amax(dim=1, keepdim=True)
    # [N, 1], powers of two: float16 has room for all scales of a row.
    factors = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp_min(-100))
    halves = (scales / factors).half()
    scales = halves.float() * factors
    numbers = _rounded(groups, scales.unsqueeze(2))
    zeros = None
    if layout.has_zeros:
        zeros = _rounded(-lowest, scales).clamp(0, 15) - 8
        numbers = numbers + zeros.unsqueeze(2)
    numbers = numbers.clamp(-8, 7).flatten(1)[:, : layout.num_inputs]
    factors = factors.where(is_finite, torch.nan).squeeze(1)
    return Numbers(numbers.to(torch.int8), factors, halves, None if zeros is None else zeros.to(torch.int8))


def dequantize(numbers: Numbers, layout: RowLayout) -> Tensor:
    """Returns [N, K] float32."""
    matrix = numbers.numbers.float()
    for operation, groups in ((torch.sub, numbers.zeros), (torch.mul, numbers.scales)):
        if groups is not None:
            matrix = operation(matrix, groups.float().repeat_interleave(layout.group_size, 1)[:, : layout.num_inputs])
    return matrix * numbers.factors.unsqueeze(1)


def pack(numbers: Numbers, layout: RowLayout) -> Tensor:
    """Returns [N, row_bytes] uint8."""
    num_rows, num_inputs = numbers.numbers.shape
    rows = torch.zeros(num_rows, layout.row_bytes, dtype=torch.uint8)
    rows[:, :4] = numbers.factors.contiguous().unsqueeze(1).view(torch.uint8)
    weights = F.pad(numbers.numbers, (0, layout.num_chunks * CHUNK_INPUTS[layout.num_bits] - num_inputs))
    if layout.group_size:
        assert numbers.scales is not None
        rows[:, 4] = GROUP_SIZES.index(layout.group_size)
        rows[:, 5] = layout.has_zeros
        spare = layout.num_groups - numbers.scales.shape[1]
        end = HEAD_BYTES + 2 * layout.num_groups
        rows[:, HEAD_BYTES:end] = F.pad(numbers.scales, (0, spare)).contiguous().view(torch.uint8)
    if layout.num_bits == 8:
        rows[:, layout.weights_at :] = weights.contiguous().view(torch.uint8)
        return rows
    if layout.has_zeros:
        assert numbers.zeros is not None
        rows[:, end : end + layout.num_groups] = F.pad(numbers.zeros, (0, spare)).contiguous().view(torch.uint8)
    rows[:, layout.weights_at :] = pack_nibbles(weights.view(torch.uint8))
    return rows


def pack_nibbles(numbers: Tensor) -> Tensor:
    """[N, 128 chunks] uint8, their low four bits -> [N, 64 chunks] uint8."""
    # Weight 32 j + 8 p + t of a chunk: bits 4 p of the 16-bit word 8 j + t.
    p0, p1, p2, p3 = (numbers & 15).view(len(numbers), -1, 4, 4, 8).unbind(3)  # each [N, chunk, j, t]
    return torch.stack((p0 | p1 << 4, p2 | p3 << 4), dim=-1).flatten(1)


def unpack_nibbles(chunks: Tensor) -> Tensor:
    """Undoes `pack_nibbles`."""
    low, high = chunks.reshape(len(chunks), -1, 4, 8, 2).unbind(4)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=3).flatten(1)


def unpack(rows: Tensor, layout: RowLayout) -> Numbers:
    """What `pack` was given, its scales and zeros without those past the inputs."""
    factors = rows[:, :4].contiguous().view(torch.float32).squeeze(1)
    weights = rows[:, layout.weights_at :]
    scales = None
    if layout.group_size:
        end = HEAD_BYTES + 2 * layout.num_groups
        num_groups = -(-layout.num_inputs // layout.group_size)
        scales = rows[:, HEAD_BYTES:end].contiguous().view(torch.float16)[:, :num_groups]
    if layout.num_bits == 8:
        return Numbers(weights.view(torch.int8)[:, : layout.num_inputs], factors, scales)
    numbers = ((unpack_nibbles(weights) ^ 8).view(torch.int8) - 8)[:, : layout.num_inputs]
    zeros = rows[:, end : end + num_groups].contiguous().view(torch.int8) if layout.has_zeros else None
    return Numbers(numbers, factors, scales, zeros)


def part_of(rows: Tensor, layout: RowLayout, inputs: range) -> Tensor:
    """The rows [N, row_bytes of fewer inputs] of some inputs alone. Where groups differ, one begins with the first."""
    part = replace(layout, num_inputs=len(inputs))
    found = torch.zeros(len(rows), part.row_bytes, dtype=torch.uint8)
    found[:, :HEAD_BYTES] = rows[:, :HEAD_BYTES]
    if layout.group_size:
        first, num = inputs.start // layout.group_size, -(-len(inputs) // layout.group_size)
        for num_bytes, before in ((2, 0), (1, 2)) if layout.has_zeros else ((2, 0),):  # scales, then zeros
            to, of = (HEAD_BYTES + before * each.num_groups for each in (part, layout))
            found[:, to : to + num_bytes * num] = rows[:, of + num_bytes * first : of + num_bytes * (first + num)]
    if layout.num_bits == 8:
        weights = rows[:, layout.weights_at + inputs.start : layout.weights_at + inputs.stop]
        found[:, part.weights_at : part.weights_at + len(inputs)] = weights
    else:
        found[:, part.weights_at :] = nibbles_of(rows[:, layout.weights_at :], inputs)
    return found


def nibbles_of(chunks: Tensor, inputs: range) -> Tensor:
    """As `pack_nibbles` has them, some inputs alone, then zeros."""
    of_chunk = CHUNK_INPUTS[4]
    first, num_chunks = inputs.start // of_chunk, -(-len(inputs) // of_chunk)
    if not inputs.start % of_chunk and not inputs.stop % of_chunk:
        return chunks[:, 64 * first : 64 * (first + num_chunks)]
    numbers = unpack_nibbles(chunks[:, 64 * first : 64 * -(-inputs.stop // of_chunk)])
    numbers = numbers[:, inputs.start - first * of_chunk : inputs.stop - first * of_chunk]
    return pack_nibbles(F.pad(numbers, (0, num_chunks * of_chunk - len(inputs))))


def _rounded(numbers: Tensor, scales: Tensor) -> Tensor:
    """Multiples of the scales, ties to even; 0 where a scale is 0."""
    return torch.where(scales == 0, 0.0, numbers / scales).round()
