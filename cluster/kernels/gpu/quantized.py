"""Products with weights in 8 or 4 bits, in Triton: their rows are read as they lie, and widened in registers.

A row is that of a `RowLayout`, as on the CPU. Four bits lie so that a chunk's 32 words of 16 bits give four tiles of 32
inputs by four shifts, and a word's four inputs share a group: nothing moves between threads.
M: rows, N: outputs, K: inputs, J: matrices one above another; T, H, I, L, P as in `experts`.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cluster.config.quantization import HEAD_BYTES, RowLayout
from cluster.kernels.gpu.experts import COLUMNS, MAX_PAIRS, ROWS, _pairs_of, combine
from cluster.kernels.grouping import group_pairs
from cluster.kernels.nf4_numbers import LEVELS, dynamic_map
from cluster.kernels.stack import Stack

MANY_ROWS = 64  # of a tile, where there are more than ROWS: its weights are widened once for all of them


@triton.jit
def _load(rows, place, mask, TYPE: tl.constexpr):
    """Numbers of this type in rows of bytes. place: how many of them are before: Triton sees which are neighbours."""
    return tl.load(rows.to(tl.pointer_type(TYPE)) + place, mask=mask, other=0)


@triton.jit
def _scale_of(rows, group, mask, scales_at, tables, NF4: tl.constexpr):
    """A number's multiplier, but for its row's factor."""
    if NF4:
        later = group - _load(rows, 3, mask, tl.int16).to(tl.int32)
        nested = _load(rows, 3 + tl.where(later < 0, 0, 1 + later // 256), mask, tl.float32)
        number = _load(rows, scales_at + group, mask, tl.uint8).to(tl.int32)
        scale = tl.load(tables + 16 + number) * nested + _load(rows, 2, mask, tl.float32)
    else:
        scale = _load(rows, scales_at + group, mask, tl.float16).to(tl.float32)
    return scale


@triton.jit
def _numbers(packed, part: tl.constexpr, tables, BITS: tl.constexpr, NF4: tl.constexpr):
    """In float32, from bytes or one of the four in each word."""
    if NF4:
        numbers = tl.load(tables + ((packed >> 4 * part) & 15))
    elif BITS == 4:
        numbers = ((((packed >> 4 * part) & 15) ^ 8) - 8).to(tl.float32)
    else:
        numbers = packed.to(tl.float32)
    return numbers


@triton.jit
def _multiply(
    x_rows, is_real, rows, is_there, order, tables, num_inputs, scales_at, zeros_at, weights_at,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, NF4: tl.constexpr, ORDERED: tl.constexpr,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[M, N] float32. x_rows: [M] pointers to rows of inputs; rows: [N] pointers to the bytes of outputs.

    order: [K], the input that comes first, second, …, if ORDERED.  tables: 16 levels and 256 scales, if NF4.
    """
    value = tl.zeros([M, N], tl.float32)
    lane = tl.arange(0, LANES)
    first = lane if BITS == 8 else lane // 8 * 32 + lane % 8  # of a lane's inputs, the others are 8, 16 and 24 behind
    chunk = lane // 64 * 64 if BITS == 8 else lane // 32 * 128
    rows, is_there = rows[None, :], is_there[None, :]
    for start in range(0, num_inputs, LANES if BITS == 8 else 4 * LANES):
        inside = (start + chunk < num_inputs)[:, None] & is_there
        if BITS == 8:
            packed = _load(rows, weights_at + start + lane[:, None], inside, tl.int8).to(tl.int32)
        else:
            packed = _load(rows, weights_at // 2 + start // 4 + lane[:, None], inside, tl.int16).to(tl.int32)
        if GROUP == 4 * LANES:  # one for all
            group = tl.full([1, 1], start // GROUP, tl.int32)
            of_groups = is_there
        elif GROUP > 0:
            group = ((start + first) // GROUP)[:, None]
            of_groups = inside
        if GROUP > 0:
            scale = _scale_of(rows, group, of_groups, scales_at, tables, NF4)
        if ZEROS:
            zero = _load(rows, zeros_at + group, of_groups, tl.int8).to(tl.float32)
        for part in tl.static_range(1 if BITS == 8 else 4):
            inputs = start + first + 8 * part
            is_input = inputs < num_inputs
            if ORDERED:
                inputs = tl.load(order + inputs, mask=is_input, other=0)
            a = tl.load(x_rows[:, None] + inputs[None, :], mask=is_real[:, None] & is_input[None, :], other=0.0)
            b = _numbers(packed, part, tables, BITS, NF4)
            if ZEROS:
                b -= zero
            if GROUP > 0:
                b *= scale
            if EXACT:
                value += tl.dot(a, b, input_precision="ieee")
            else:
                value += tl.dot(a, b.to(a.dtype))
    return value * _load(rows, 0, is_there, tl.float32)  # [1, N], the rows' factors


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    out, x, matrix, bias, tables, num_rows, num_outputs, x_stride,
    row_bytes, num_inputs, scales_at, zeros_at, weights_at,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, NF4: tl.constexpr, HAS_BIAS: tl.constexpr,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out: [M, N]; x: [M, K]."""
    row = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    is_real, is_there = row < num_rows, column < num_outputs
    value = _multiply(
        x + row * x_stride, is_real, matrix + column.to(tl.int64) * row_bytes, is_there, tables, tables, num_inputs,
        scales_at, zeros_at, weights_at, BITS, GROUP, ZEROS, NF4, False, LANES, M, N, EXACT,
    )  # fmt: skip
    if HAS_BIAS:
        value += tl.load(bias + column, mask=is_there, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * num_outputs + column[None, :], value, mask=is_real[:, None] & is_there[None, :])


@triton.jit
def _some_pairs(
    topk_ids, sorted_pairs, starts, expert, num_pairs, first,
    PAIRS: tl.constexpr, M: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """As `_pairs_of`. SORTED: an expert's are those of `sorted_pairs` [P] from its number in `starts` [L + 1] on."""
    if SORTED:
        begin = tl.load(starts + expert)
        count = (tl.load(starts + expert + 1) - begin).to(tl.int32)
        wanted = first + tl.arange(0, M)
        pairs = tl.load(sorted_pairs + begin + wanted, mask=wanted < count, other=0)
    else:
        pairs, count = _pairs_of(topk_ids, expert, num_pairs, first, PAIRS, M)
    return pairs, count


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_up(
    inner, x, topk_ids, sorted_pairs, starts, matrices, orders, tables, num_pairs, width, x_stride, row_bytes,
    num_inputs, scales_at, zeros_at, weights_at,
    TOPK: tl.constexpr, PAIRS: tl.constexpr, SORTED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, NF4: tl.constexpr, ORDERED: tl.constexpr,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """inner: [P, I], SiLU(gate) * up of each pair whose expert is here. N / 2 of the I columns, all of an expert's
    rows. ORDERED: `orders` [L, 2, H], of gate and of up."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * (N // 2) + tl.arange(0, N // 2)
    is_there = column < width
    matrix = matrices + expert.to(tl.int64) * 2 * width * row_bytes
    first, count = 0, 1
    while first < count:
        pairs, count = _some_pairs(topk_ids, sorted_pairs, starts, expert, num_pairs, first, PAIRS, M, SORTED)
        is_real = first + tl.arange(0, M) < count
        if count > 0:
            rows = x + (pairs // TOPK) * x_stride
            if ORDERED:
                order = orders + expert.to(tl.int64) * 2 * num_inputs
                gate = _multiply(
                    rows, is_real, matrix + column * row_bytes, is_there, order, tables, num_inputs, scales_at,
                    zeros_at, weights_at, BITS, GROUP, ZEROS, NF4, True, LANES, M, N // 2, EXACT,
                )  # fmt: skip
                up = _multiply(
                    rows, is_real, matrix + (width + column) * row_bytes, is_there, order + num_inputs, tables,
                    num_inputs, scales_at, zeros_at, weights_at, BITS, GROUP, ZEROS, NF4, True, LANES, M, N // 2, EXACT,
                )  # fmt: skip
            else:
                both = tl.arange(0, N)  # gate, up, gate, up, …
                its = tl.program_id(0) * (N // 2) + both // 2
                value = _multiply(
                    rows, is_real, matrix + (both % 2 * width + its) * row_bytes, its < width, tables, tables,
                    num_inputs, scales_at, zeros_at, weights_at, BITS, GROUP, ZEROS, NF4, False, LANES, M, N, EXACT,
                )  # fmt: skip
                gate, up = tl.split(tl.reshape(value, (M, N // 2, 2)))
            value = gate / (1.0 + tl.exp(-gate)) * up
            mask = is_real[:, None] & is_there[None, :]
            tl.store(inner + pairs.to(tl.int64)[:, None] * width + column[None, :], value, mask=mask)
        first += M


@triton.jit(do_not_specialize=["num_pairs"])
def _down(
    outer, inner, topk_ids, topk_weights, sorted_pairs, starts, matrices, orders, tables, num_pairs, hidden, row_bytes,
    num_inputs, scales_at, zeros_at, weights_at,
    PAIRS: tl.constexpr, SORTED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, NF4: tl.constexpr, ORDERED: tl.constexpr,
    LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """outer: [P, H], each pair's weighted product. N of the H columns. ORDERED: `orders` [L, 1, I]."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * N + tl.arange(0, N)
    is_there = column < hidden
    matrix = matrices + expert.to(tl.int64) * hidden * row_bytes
    first, count = 0, 1
    while first < count:
        pairs, count = _some_pairs(topk_ids, sorted_pairs, starts, expert, num_pairs, first, PAIRS, M, SORTED)
        is_real = first + tl.arange(0, M) < count
        if count > 0:
            value = _multiply(
                inner + pairs.to(tl.int64) * num_inputs, is_real, matrix + column * row_bytes, is_there,
                orders + expert.to(tl.int64) * num_inputs, tables, num_inputs, scales_at, zeros_at, weights_at,
                BITS, GROUP, ZEROS, NF4, ORDERED, LANES, M, N, EXACT,
            )  # fmt: skip
            value *= tl.load(topk_weights + pairs, mask=is_real, other=0.0)[:, None]
            mask = is_real[:, None] & is_there[None, :]
            tl.store(outer + pairs.to(tl.int64)[:, None] * hidden + column[None, :], value, mask=mask)
        first += M


def linear(x: Tensor, matrix: Tensor, layout: RowLayout, bias: Tensor | None = None) -> Tensor:
    """As F.linear. x: [M, K]; matrix: [N, row_bytes] uint8; bias: [N]. Returns [M, N] in x's dtype."""
    x = x.contiguous()
    (num_rows, _), num_outputs = x.shape, len(matrix)
    out = x.new_empty(num_rows, num_outputs)
    if num_rows:
        height = _height(num_rows)
        _linear[triton.cdiv(num_outputs, COLUMNS), triton.cdiv(num_rows, height)](
            out, x, matrix, out if bias is None else bias, _tables(matrix, layout), num_rows, num_outputs, x.stride(0),
            *_places(layout), HAS_BIAS=bias is not None, M=height, **_options(layout, x.dtype),
        )  # fmt: skip
    return out


def experts(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Stack, down: Stack,
    *, max_pairs: int = MAX_PAIRS,
) -> Tensor:  # fmt: skip
    """As `experts_reference`. Does not look at values on the device. The sums run in the order of a token's slots.

    max_pairs: of more a sort gives each expert its own, of fewer each expert finds them.
    """
    (num_tokens, topk), (num_experts, hidden, _) = topk_ids.shape, down.rows.shape
    num_pairs, width = num_tokens * topk, down.layout.num_inputs
    x, topk_ids, topk_weights = hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    if not num_pairs or not num_experts:
        return torch.zeros(hidden_states.shape, dtype=torch.float32, device=x.device)
    is_sorted = num_pairs > max_pairs
    sorted_pairs = starts = topk_ids
    if is_sorted:
        _, sorted_pairs, counts = group_pairs(topk_ids, num_experts)
        starts = F.pad(counts.cumsum(0), (1, 0))  # [L + 1]
    pairs = {"PAIRS": 16 if is_sorted else max(16, triton.next_power_of_2(num_pairs)), "SORTED": is_sorted}
    pairs["M"] = MANY_ROWS if is_sorted else ROWS
    tables = _tables(down.rows, down.layout)
    inner = x.new_empty(num_pairs, width)
    outer = torch.empty(num_pairs, hidden, dtype=x.dtype if is_sorted else torch.float32, device=x.device)
    _gate_up[triton.cdiv(width, COLUMNS // 2), num_experts](
        inner, x, topk_ids, sorted_pairs, starts, gate_up.rows, tables if gate_up.orders is None else gate_up.orders,
        tables, num_pairs, width, x.stride(0), *_places(gate_up.layout), TOPK=topk,
        ORDERED=gate_up.orders is not None, **pairs, **_options(gate_up.layout, x.dtype),
    )  # fmt: skip
    _down[triton.cdiv(hidden, COLUMNS), num_experts](
        outer, inner, topk_ids, topk_weights, sorted_pairs, starts, down.rows,
        tables if down.orders is None else down.orders, tables, num_pairs, hidden, *_places(down.layout),
        ORDERED=down.orders is not None, **pairs, **_options(down.layout, x.dtype),
    )  # fmt: skip
    return combine(outer, topk_ids, topk_weights, None)


def _height(num_rows: int) -> int:
    return ROWS if num_rows <= ROWS else MANY_ROWS


def _places(layout: RowLayout) -> tuple[int, ...]:
    """A row's bytes, its inputs, and where its scales begin, in float16 or nf4's bytes, its zeros and its weights."""
    scales_at = HEAD_BYTES + 4 * (1 + layout.num_nested) if layout.is_nf4 else HEAD_BYTES // 2
    return layout.row_bytes, layout.num_inputs, scales_at, HEAD_BYTES + 2 * layout.num_groups, layout.weights_at


def _options(layout: RowLayout, dtype: torch.dtype) -> dict[str, int | bool]:
    exact = dtype == torch.float32
    return {
        "BITS": layout.num_bits, "GROUP": layout.group_size, "ZEROS": layout.has_zeros, "NF4": layout.is_nf4,
        "LANES": 32 if layout.num_bits == 4 else 64, "N": COLUMNS, "EXACT": exact, "num_warps": 4,
        "num_stages": 1 if layout.is_nf4 else 3,  # else it would copy a number of a table for each weight beforehand
    }  # fmt: skip


def _tables(matrix: Tensor, layout: RowLayout) -> Tensor:
    """As of `_multiply`; any tensor where there is no use for them."""
    return _nf4_tables(matrix.device) if layout.is_nf4 else matrix


@cache
def _nf4_tables(device: torch.device) -> Tensor:
    return torch.cat((torch.tensor(LEVELS), dynamic_map())).to(device)
