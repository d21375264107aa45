"""Attention straight over the paged cache, in Triton: no copy of keys, any block size, float32 and 16 bits.

A key that no query of a tile sees is not read, so what stands past a sequence's end does not matter. A sequence's
numbers depend on its own context alone: its keys are taken in chunks of a fixed size, whatever else is in the batch.
T: new tokens of all sequences, B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size,
M: rows of a tile, each a query in one head, N: keys at a time.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.paged import PagedBatch

CHUNK = 256  # keys of a decode row that one program takes; `_join` adds the chunks' results
PREFILL_ROWS, PREFILL_WARPS, PREFILL_STAGES = 64, 4, 3  # the fastest of five on an H200, heads of 128
FEWEST_ROWS = 16  # that a matrix unit multiplies


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee") if EXACT else tl.dot(a, b)


@triton.jit
def _load_rows(cache, slots, is_there, head, head_dim, slot_stride, head_stride, D: tl.constexpr):
    dims = tl.arange(0, D)
    places = slots[:, None] * slot_stride + head * head_stride + dims[None, :]
    return tl.load(cache + places, mask=is_there[:, None] & (dims < head_dim)[None, :], other=0.0)


@triton.jit
def _weigh(scores, visible, largest, total):
    """Source: Milakov and Gimelshein, Online normalizer calculation for softmax."""
    now = tl.maximum(largest, tl.max(scores, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)  # of rows that have seen nothing yet
    weights = tl.where(visible, tl.exp(scores - base[:, None]), 0.0)
    shrink = tl.exp(largest - base)
    return weights, shrink, now, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _keep_wild_from_others(sums, v, visible):
    """A weight of zero times NaN is NaN: numbers that are not finite reach the queries that see them and no other."""
    is_wild = v.to(tl.float32) * 0.0 != 0.0
    if tl.sum(tl.sum(is_wild.to(tl.int32), axis=1), axis=0) > 0:
        met = tl.dot(visible.to(tl.float32), is_wild.to(tl.float32), input_precision="ieee")
        sums = tl.where(met > 0.0, float("nan"), sums)
        v = tl.where(is_wild, 0.0, v)
    return sums, v


@triton.jit(do_not_specialize=["window", "table_width", "num_chunks"])
def _attend(
    out, parts, logsums, q, k_cache, v_cache, tables, context_lens, query_starts, tile_sequences, tile_queries,
    scale, window, num_heads, head_dim, block_size, table_width, num_chunks, slot_stride, head_stride,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    DECODES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of one sequence's queries, in all query heads of one key/value head. DECODES: its only query, over one
    chunk of KEYS keys, the answer to `parts` and the logarithm of its weight to `logsums`."""
    tile, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tile_sequences + tile)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    query_start = tl.load(query_starts + sequence).to(tl.int64)
    query_len = tl.load(query_starts + sequence + 1).to(tl.int32) - query_start.to(tl.int32)
    first_query = 0 if DECODES else tl.load(tile_queries + tile)
    rows = tl.arange(0, M)
    query, head = first_query + rows // GROUP, kv_head * GROUP + rows % GROUP
    row_is_real = (query < query_len) & (rows // GROUP < M // GROUP)
    position = context_len - query_len + query
    oldest = context_len - query_len + first_query
    start, stop = tl.maximum(oldest - window + 1, 0), tl.minimum(oldest + M // GROUP, context_len)
    if DECODES:
        start, stop = tl.maximum(start, chunk * KEYS), tl.minimum(stop, (chunk + 1) * KEYS)
    dims = tl.arange(0, D)
    is_real = row_is_real[:, None] & (dims < head_dim)[None, :]
    places = ((query_start + query) * num_heads + head) * head_dim
    tile_q = tl.load(q + places[:, None] + dims[None, :], mask=is_real, other=0.0)
    largest, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for first in range(start, stop, N):
        keys = first + tl.arange(0, N)
        blocks = tl.load(tables + sequence * table_width + keys // block_size, mask=keys < stop, other=0).to(tl.int64)
        slots = blocks * block_size + keys % block_size
        k = _load_rows(k_cache, slots, keys < stop, kv_head, head_dim, slot_stride, head_stride, D)
        v = _load_rows(v_cache, slots, keys < stop, kv_head, head_dim, slot_stride, head_stride, D)
        visible = (keys[None, :] <= position[:, None]) & (keys[None, :] > position[:, None] - window)
        visible = visible & (keys < stop)[None, :] & row_is_real[:, None]
        scores = tl.where(visible, _dot(tile_q, tl.trans(k), EXACT) * scale, float("-inf"))
        weights, shrink, largest, total = _weigh(scores, visible, largest, total)
        sums = sums * shrink[:, None]
        if not DECODES and ((first + N > oldest + 1) | (first <= oldest + M // GROUP - window)):  # not all see all keys
            sums, v = _keep_wild_from_others(sums, v, visible)
        sums += _dot(weights.to(v.dtype), v, EXACT)
    answer = sums / total[:, None]
    if DECODES:
        part = (tile.to(tl.int64) * num_heads + head) * num_chunks + chunk
        tl.store(logsums + part, largest + tl.log(total), mask=row_is_real)
        tl.store(parts + part[:, None] * head_dim + dims[None, :], answer, mask=is_real)
    else:
        tl.store(out + places[:, None] + dims[None, :], answer, mask=is_real)


@triton.jit(do_not_specialize=["window", "num_chunks"])
def _join(
    out, parts, logsums, context_lens, query_starts, tile_sequences, window, num_heads, head_dim, num_chunks,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds the chunks that a decode row sees, each with its share of the weight, in their order."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    dims = tl.arange(0, D)
    first = (tile.to(tl.int64) * num_heads + head) * num_chunks
    largest = float("-inf")
    total = 0.0
    sums = tl.zeros([D], tl.float32)
    for chunk in range(tl.maximum(context_len - window, 0) // KEYS, tl.cdiv(context_len, KEYS)):
        log = tl.load(logsums + first + chunk)
        part = tl.load(parts + (first + chunk) * head_dim + dims, mask=dims < head_dim, other=0.0)
        now = tl.maximum(largest, log)
        shrink = tl.exp(largest - now)
        weight = tl.exp(log - now)
        total = total * shrink + weight
        sums = sums * shrink + part * weight
        largest = now
    row = tl.load(query_starts + sequence).to(tl.int64)
    tl.store(out + (row * num_heads + head) * head_dim + dims, sums / total, mask=dims < head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """An `AttentionPlan`. Sequences with one new token are decoded, the others' tokens are taken in tiles.

    query_starts: [B + 1] int32, where each sequence's new tokens begin.  context_lens: [B].  block_tables: [B, n].
    decode: [sequences] int32.  tile_sequences, tile_queries: [tiles] int32, the sequence of each tile and its first
    query's number among the sequence's new ones.  num_chunks: of CHUNK keys, for the longest sequence of `decode`.
    """

    slot_mapping: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    decode: Tensor
    tile_sequences: Tensor
    tile_queries: Tensor
    num_chunks: int

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None) -> Tensor:
        """As `AttentionPlan.attend`. Does not look at values on the device."""
        q = q.contiguous()
        out = torch.empty_like(q)
        _, num_heads, head_dim = q.shape
        _, block_size, num_kv_heads, _ = k_cache.shape
        assert k_cache.stride() == v_cache.stride()
        assert k_cache.stride(3) == 1
        lists = (self.block_tables, self.context_lens, self.query_starts)
        window = window or 1 << 30
        numbers = (scale, window, num_heads, head_dim, block_size, self.block_tables.stride(0))
        strides = (k_cache.stride(1), k_cache.stride(2))
        group, width = num_heads // num_kv_heads, max(FEWEST_ROWS, triton.next_power_of_2(head_dim))
        options = {"GROUP": group, "D": width, "KEYS": CHUNK, "EXACT": q.dtype == torch.float32}
        if len(self.tile_sequences):
            _attend[len(self.tile_sequences), num_kv_heads, 1](
                out, out, out, q, k_cache, v_cache, *lists, self.tile_sequences, self.tile_queries, *numbers, 1,
                *strides, M=prefill_rows(group), N=64 if width <= 128 else 32, DECODES=False, num_warps=PREFILL_WARPS,
                num_stages=PREFILL_STAGES,
                **options,
            )  # fmt: skip
        if len(self.decode):
            shape = len(self.decode), num_heads, self.num_chunks
            parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
            logsums = torch.empty(shape, dtype=torch.float32, device=q.device)
            _attend[len(self.decode), num_kv_heads, self.num_chunks](
                out, parts, logsums, q, k_cache, v_cache, *lists, self.decode, self.decode, *numbers, self.num_chunks,
                *strides, M=max(FEWEST_ROWS, triton.next_power_of_2(group)), N=64, DECODES=True, num_warps=4,
                num_stages=3, **options,
            )  # fmt: skip
            _join[len(self.decode), num_heads](
                out, parts, logsums, self.context_lens, self.query_starts, self.decode, window, num_heads, head_dim,
                self.num_chunks, D=width, KEYS=CHUNK, num_warps=1,
            )  # fmt: skip
        return out


def prefill_rows(group: int) -> int:
    """The rows of a tile: a query in each of the `group` heads takes so many of them."""
    return max(PREFILL_ROWS, 1 << (group - 1).bit_length())


class PagedAttention:
    """An `AttentionKernel`. group: query heads that share keys."""

    reads_whole_blocks = False

    def __init__(self, group: int) -> None:
        self._tile_queries = prefill_rows(group) // group

    def plan(self, batch: PagedBatch) -> PagedPlan:
        """Does not look at values on the device."""
        lens = np.asarray(batch.query_lens)
        decode = np.flatnonzero(lens == 1)
        tiles = np.where(lens == 1, 0, -(-lens // self._tile_queries))
        sequences = np.repeat(np.arange(len(lens)), tiles)
        starts = np.cumsum(tiles) - tiles
        queries = (np.arange(len(sequences)) - starts[sequences]) * self._tile_queries
        query_starts = np.concatenate(([0], np.cumsum(lens)))
        # One copy to the device for all of them.
        lists = (query_starts, decode, sequences, queries)
        packed = torch.from_numpy(np.concatenate(lists).astype(np.int32))
        parts = packed.to(batch.block_tables.device, non_blocking=True).split([len(part) for part in lists])
        longest = max((batch.context_lens[i] for i in decode.tolist()), default=1)
        return PagedPlan(
            slot_mapping=batch.slot_mapping,
            query_starts=parts[0],
            context_lens=batch.context_lens_tensor,
            block_tables=batch.block_tables,
            decode=parts[1],
            tile_sequences=parts[2],
            tile_queries=parts[3],
            num_chunks=-(-longest // CHUNK),
        )

    def plan_decode(self, slots: Tensor, context_lens: Tensor, block_tables: Tensor, longest: int) -> PagedPlan:
        """As `PlansDecode.plan_decode`."""
        starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
        return PagedPlan(
            slot_mapping=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=block_tables,
            decode=starts[:-1],
            tile_sequences=starts[:0],
            tile_queries=starts[:0],
            num_chunks=-(-longest // CHUNK),
        )
