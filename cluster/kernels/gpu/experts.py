"""Products of a batch with a layer's routed experts, in Triton: three launches, no host synchronisation.

For few rows, where reading the weights takes the time: each program looks up the pairs of its expert by itself, so
nothing is sorted or gathered before. For many rows torch's `grouped_mm` multiplies, and only what it has no fused
operation for is here.
T: tokens, H: hidden size, I: expert intermediate size, K: experts a token, L: experts of this set, P: T * K pairs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.grouping import group_pairs

# A program holds the ids of all pairs. At 1024 it takes 416 us, where sorting, torch's grouped products and a sum
# take 444; at 512 it is 273 against 437 (H200, A2.7B's shapes).
MAX_PAIRS = 1024
ROWS, COLUMNS = 16, 64  # of a tile; the fewest rows that a matrix unit multiplies


@triton.jit
def _pairs_of(topk_ids, expert, num_pairs, first, PAIRS: tl.constexpr, M: tl.constexpr):
    """The numbers of M of the expert's pairs, from its `first` one on, in their order; and how many it has."""
    pairs = tl.arange(0, PAIRS)
    is_its = tl.load(topk_ids + pairs, mask=pairs < num_pairs, other=-1) == expert
    place = tl.cumsum(is_its.to(tl.int32), axis=0) - 1
    wanted = first + tl.arange(0, M)
    chosen = is_its[None, :] & (place[None, :] == wanted[:, None])
    return tl.sum(tl.where(chosen, pairs[None, :], 0), axis=1), tl.sum(is_its.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_up(
    inner, x, topk_ids, gate_up, num_pairs, hidden, width, x_stride,
    TOPK: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """inner: [P, I], SiLU(gate) * up of each pair whose expert is here. N of the I columns, all of an expert's rows."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    first, count = 0, 1
    while first < count:
        pairs, count = _pairs_of(topk_ids, expert, num_pairs, first, PAIRS, M)
        is_real = first + tl.arange(0, M) < count
        if count > 0:
            gate, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
            depth = tl.arange(0, DEPTH)
            rows = x + (pairs // TOPK)[:, None] * x_stride + depth[None, :]
            weight = gate_up + expert.to(tl.int64) * 2 * width * hidden + columns[None, :] * hidden + depth[:, None]
            for start in range(0, hidden, DEPTH):
                inside = start + depth < hidden
                a = tl.load(rows + start, mask=is_real[:, None] & inside[None, :], other=0.0)
                mask = (columns < width)[None, :] & inside[:, None]
                b = tl.load(weight + start, mask=mask, other=0.0)
                c = tl.load(weight + start + width * hidden, mask=mask, other=0.0)
                if EXACT:
                    gate += tl.dot(a, b, input_precision="ieee")
                    up += tl.dot(a, c, input_precision="ieee")
                else:
                    gate += tl.dot(a, b)
                    up += tl.dot(a, c)
            value = gate / (1.0 + tl.exp(-gate)) * up
            mask = is_real[:, None] & (columns < width)[None, :]
            tl.store(inner + pairs[:, None] * width + columns[None, :], value, mask=mask)
        first += M


@triton.jit(do_not_specialize=["num_pairs"])
def _down(
    outer, inner, topk_ids, topk_weights, down, num_pairs, hidden, width,
    PAIRS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """outer: [P, H] float32, each pair's weighted product. N of the H columns."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    first, count = 0, 1
    while first < count:
        pairs, count = _pairs_of(topk_ids, expert, num_pairs, first, PAIRS, M)
        is_real = first + tl.arange(0, M) < count
        if count > 0:
            value = tl.zeros([M, N], tl.float32)
            depth = tl.arange(0, DEPTH)
            rows = inner + pairs[:, None] * width + depth[None, :]
            weight = down + expert.to(tl.int64) * hidden * width + columns[None, :] * width + depth[:, None]
            for start in range(0, width, DEPTH):
                inside = start + depth < width
                a = tl.load(rows + start, mask=is_real[:, None] & inside[None, :], other=0.0)
                b = tl.load(weight + start, mask=(columns < hidden)[None, :] & inside[:, None], other=0.0)
                if EXACT:
                    value += tl.dot(a, b, input_precision="ieee")
                else:
                    value += tl.dot(a, b)
            value *= tl.load(topk_weights + pairs, mask=is_real, other=0.0)[:, None]
            mask = is_real[:, None] & (columns < hidden)[None, :]
            tl.store(outer + pairs[:, None] * hidden + columns[None, :], value, mask=mask)
        first += M


@triton.jit
def _combine(
    out, outer, places, topk_ids, topk_weights, hidden,
    TOPK: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """out: [T, H] float32, the sum over a token's pairs in the order of its slots. WEIGHTED: `outer` [P, H] has the
    pairs where `places` [P] says, each to be multiplied by its weight; else in their order, multiplied already."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for slot in range(TOPK):
        pair = token * TOPK + slot
        if tl.load(topk_ids + pair) >= 0:  # nothing was written for others
            place = pair
            if WEIGHTED:
                place = tl.load(places + pair)
            value = tl.load(outer + place * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(topk_weights + pair)
            total += value
    tl.store(out + token * hidden + columns, total, mask=columns < hidden)


@triton.jit
def _silu_mul(out, gate_up, width, N: tl.constexpr):
    """out: [P, I]; gate_up: [P, 2I], gate beside up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    gate = tl.load(gate_up + row * 2 * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, gate / (1.0 + tl.exp(-gate)) * up, mask=columns < width)


def experts_in_triton(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """As `experts_reference`. Does not look at values on the device."""
    product = experts_of_few_rows if topk_ids.numel() <= MAX_PAIRS else experts_of_many_rows
    return product(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)


def experts_of_many_rows(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """As `experts_reference`, by torch's grouped products. Pairs that are computed elsewhere are grouped behind the
    last expert and multiplied by no weights."""
    pair_tokens, order, counts = group_pairs(topk_ids, gate_up_proj.shape[0])
    offsets = counts.cumsum(0).to(torch.int32)  # [L]
    x = hidden_states.index_select(0, pair_tokens)  # [P, H]
    inner = silu_mul(F.grouped_mm(x, gate_up_proj.transpose(1, 2), offs=offsets))
    outer = F.grouped_mm(inner, down_proj.transpose(1, 2), offs=offsets)  # [P, H]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return combine(outer, topk_ids, topk_weights, places)


def experts_of_few_rows(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """As `experts_reference`, for MAX_PAIRS pairs at most. Each active expert's weights are read once for every ROWS
    of its rows; the sums run in the order of a token's slots."""
    num_tokens, topk = topk_ids.shape
    num_experts, hidden, width = down_proj.shape
    num_pairs = num_tokens * topk
    assert num_pairs <= MAX_PAIRS
    hidden_states, topk_ids, topk_weights = hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    exact = hidden_states.dtype == torch.float32
    options = {
        "PAIRS": max(16, triton.next_power_of_2(num_pairs)), "M": ROWS, "N": COLUMNS, "EXACT": exact,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    inner = hidden_states.new_empty(num_pairs, width)
    outer = torch.empty(num_pairs, hidden, dtype=torch.float32, device=hidden_states.device)
    _gate_up[triton.cdiv(width, COLUMNS), num_experts](
        inner, hidden_states, topk_ids, gate_up_proj, num_pairs, hidden, width, hidden_states.stride(0),
        TOPK=topk, DEPTH=64 if exact else 128, **options,
    )  # fmt: skip
    _down[triton.cdiv(hidden, COLUMNS), num_experts](
        outer, inner, topk_ids, topk_weights, down_proj, num_pairs, hidden, width,
        DEPTH=64, **options,
    )  # fmt: skip
    return combine(outer, topk_ids, topk_weights, None)


def combine(outer: Tensor, topk_ids: Tensor, topk_weights: Tensor, places: Tensor | None) -> Tensor:
    """Sums each token's pairs in the order of its slots: [T, H] float32. places: [P], where in `outer` each pair is,
    not yet multiplied by its weight; None: in their order, multiplied."""
    num_tokens, topk = topk_ids.shape
    hidden = outer.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=torch.float32, device=outer.device)
    size = min(1024, triton.next_power_of_2(hidden))
    _combine[num_tokens, triton.cdiv(hidden, size)](
        out, outer, topk_ids if places is None else places, topk_ids.contiguous(), topk_weights.contiguous(), hidden,
        TOPK=topk, N=size, WEIGHTED=places is not None,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[P, 2I], gate beside up -> [P, I]."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], width)
    size = min(1024, triton.next_power_of_2(width))
    _silu_mul[gate_up.shape[0], triton.cdiv(width, size)](out, gate_up.contiguous(), width, N=size)
    return out
