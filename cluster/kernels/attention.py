"""Attention of new tokens over a paged cache. Knows neither layers nor who owns the blocks.

A query gets nothing of a key or value that it does not see, whatever stands there: a weight of zero times NaN is NaN,
so a mask alone does not keep another sequence's numbers out. Padding is read from a block of zeros.

T: new tokens of all sequences, B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size,
C: tokens of context, t: new tokens of one sequence.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

_reads_blocks = True  # until the first call says otherwise; before torch 2.12 it has no block_table

# Keys (or values) gathered at a time: they stay in a cache of the processor until they are multiplied, and the copy
# of a long context stays small. 32 sequences of 96 tokens in Qwen1.5-MoE-A2.7B's shapes are 12.6 MB.
MAX_GATHERED_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where a step's tokens stand. The sequences' new tokens lie one after another in the T rows.

    query_lens: new tokens of each sequence.  context_lens: its tokens in the cache once the new ones are written.
    block_tables: [B, most blocks of any sequence] int64, padded with padding_block.
    padding_block: a block of zeros that no sequence owns.
    slot_mapping: [T] int64, block * S + offset of each new token.
    context_lens_tensor: [B] int64, on the device.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Tensor
    slot_mapping: Tensor
    context_lens_tensor: Tensor
    padding_block: int
    _groups: "list[_Group]" = field(default_factory=list, init=False, repr=False, compare=False)
    _lengths: "list[_Lengths]" = field(default_factory=list, init=False, repr=False, compare=False)

    def groups(self, k_cache: Tensor) -> "list[_Group]":
        """The sequences in groups that are computed together. Made once a step: all layers' caches are shaped alike."""
        if not self._groups:
            row_bytes = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
            for chosen in _alike(self.query_lens, self.context_lens, MAX_GATHERED_BYTES // row_bytes):
                self._groups.append(_group(self, chosen, block_size=k_cache.shape[1], num_kv_heads=k_cache.shape[2]))
        return self._groups

    def lengths(self) -> "_Lengths":
        """The same for a kernel that takes all sequences at once. Made once a step."""
        if not self._lengths:
            cu_queries, cu_context = (
                torch.tensor([0, *accumulate(lens)], dtype=torch.int32).to(self.block_tables.device, non_blocking=True)
                for lens in (self.query_lens, self.context_lens)
            )
            self._lengths.append(
                _Lengths(
                    cu_queries=cu_queries,
                    cu_context=cu_context,
                    context_lens=self.context_lens_tensor.to(torch.int32),
                    block_tables=self.block_tables.to(torch.int32),
                    max_queries=max(self.query_lens),
                    max_context=max(self.context_lens),
                    total_context=sum(self.context_lens),
                )
            )
        return self._lengths[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """B sequences, padded to the longest: t queries over C tokens of context each.

    query_rows: [B * t] into the T rows, padding repeats a sequence's last.  real: [B * t] bool, None if all are.
    positions: [B, t] of the queries.  cache_rows: [B * KV * C] into the cache seen as [blocks * S * KV, D], past a
    sequence's end into the padding block.
    causal: nothing is padded and no query has older context, so that a plain causal mask is the right one.
    """

    batch: int
    num_queries: int
    context: int
    query_rows: Tensor
    real: Tensor | None
    positions: Tensor
    cache_rows: Tensor
    causal: bool

    def visible(self, window: int | None) -> Tensor:
        """[B, 1, t, C] bool, true where a query sees a key."""
        keys = torch.arange(self.context, device=self.positions.device)
        queries = self.positions.unsqueeze(-1)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return visible.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """What a kernel for sequences of any lengths takes; all tensors int32 on the device.

    cu_queries, cu_context: [B + 1], where each sequence begins.  block_tables: [B, n].  context_lens: [B].
    """

    cu_queries: Tensor
    cu_context: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_queries: int
    max_context: int
    total_context: int

    def slots(self, block_size: int) -> Tensor:
        """[sum of the contexts] int32: where in the cache each token of each context lies."""
        device = self.block_tables.device
        sequences = torch.arange(self.block_tables.shape[0], device=device)
        sequence = torch.repeat_interleave(sequences, self.context_lens, output_size=self.total_context)
        position = torch.arange(self.total_context, device=device) - self.cu_context[sequence]
        return self.block_tables[sequence, position // block_size] * block_size + position % block_size


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys and values in place. k_cache, v_cache: [blocks, S, KV, D]; k, v: [T, KV, D]."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention written out, one query at a time: the definition that the fast path must match.

    q: [T, Q, D].  window: a token sees itself and window - 1 tokens before it; None for all.
    Returns [T, Q, D] in q's dtype.
    """
    out = torch.empty_like(q)
    groups = q.shape[1] // k_cache.shape[2]
    row = 0
    for i, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        keys, values = (cache[batch.block_tables[i]].flatten(0, 1) for cache in (k_cache, v_cache))
        for position in range(context_len - query_len, context_len):
            seen = slice(max(0, position + 1 - (window or context_len)), position + 1)
            k, v = (x[seen].repeat_interleave(groups, dim=1).float() for x in (keys, values))  # [keys, Q, D]
            probs = (torch.einsum("qd,cqd->qc", q[row].float(), k) * scale).softmax(dim=-1)
            out[row] = torch.einsum("qc,cqd->qd", probs, v).to(q.dtype)
            row += 1
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, *, scale: float, window: int | None
) -> Tensor:
    """As `attention_reference`: on a GPU in 16 bits all sequences at once, else those of similar lengths together."""
    if reads_whole_blocks(q.device, q.dtype):
        return _attend_varlen(q, k_cache, v_cache, batch.lengths(), scale, window)
    out = torch.empty_like(q)
    for group in batch.groups(k_cache):
        part = _attend(q.index_select(0, group.query_rows), k_cache, v_cache, group, scale, window)
        if group.real is None:
            out.index_copy_(0, group.query_rows, part)
        else:
            out.index_copy_(0, group.query_rows[group.real], part[group.real])
    return out


def reads_whole_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel reads the cache's blocks in place. It may then read a last block to its end, and multiply by
    zero what it finds past the sequence's end: zeros must stand there."""
    return device.type == "cuda" and dtype != torch.float32


def varlen_attn(*args: Any, **options: Any) -> Any:
    """torch's, which loads with its first call: it takes 1.4 s, and a process on a CPU has no use for it."""
    from torch.nn.attention.varlen import varlen_attn as attend

    return attend(*args, **options)


def _attend_varlen(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: "_Lengths", scale: float, window: int | None
) -> Tensor:
    """Flash attention over the paged cache, without a look at device values from the host."""
    global _reads_blocks
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),
        "enable_gqa": q.shape[1] != k_cache.shape[2],
    }
    if _reads_blocks:
        try:
            out = varlen_attn(
                q, k_cache, v_cache, lengths.cu_queries, None, lengths.max_queries, lengths.max_context,
                seqused_k=lengths.context_lens, block_table=lengths.block_tables, **options,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # which block sizes a build's kernel takes is nowhere declared
            log.warning("flash attention does not read the cache's blocks, they are copied for it: %s", error)
            _reads_blocks = False
    slots = lengths.slots(k_cache.shape[1])
    k, v = (cache.view(-1, *cache.shape[2:]).index_select(0, slots) for cache in (k_cache, v_cache))
    out = varlen_attn(
        q, k, v, lengths.cu_queries, lengths.cu_context, lengths.max_queries, lengths.max_context, **options
    )
    assert isinstance(out, Tensor)
    return out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Group, scale: float, window: int | None
) -> Tensor:  # fmt: skip
    """q: [B * t, Q, D], the group's queries. Returns [B * t, Q, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    # Rows of one head each: the copy is [B, KV, C, D] at once, 4 times as fast as picking blocks by an index and
    # better for what follows (4.1 against 0.8 ms for 32 sequences of 96 tokens, 16 heads of 128, 2 threads of a Zen 4).
    k, v = (
        cache.view(-1, head_dim).index_select(0, group.cache_rows).view(group.batch, num_kv_heads, -1, head_dim)
        for cache in (k_cache, v_cache)
    )
    if group.num_queries == 1:
        grouped = q.view(group.batch, num_kv_heads, -1, head_dim)  # [B, KV, Q / KV, D]: no copy of keys for their group
        attend = _attend_written_out if q.device.type == "cpu" and q.dtype != torch.float32 else _attend_fused
        if window is not None:
            k, v = (x.masked_fill_(~group.visible(window).transpose(-1, -2), 0) for x in (k, v))
        return attend(grouped, k, v, group.visible(window), scale).reshape(q.shape)
    queries = q.view(group.batch, group.num_queries, num_heads, head_dim).transpose(1, 2)  # [B, Q, t, D]
    visible = None if group.causal and window is None else group.visible(window)
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    )
    if not out.sum(dtype=torch.float32).isfinite():
        _repair(out, queries, k, v, group.visible(window), scale)
    return out.transpose(1, 2).reshape(num_rows, num_heads, head_dim)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def _attend_written_out(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """For few queries in 16 bits on the CPU, where torch's fused attention takes 4.7 ms and this 1.4 (as above)."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale  # [B, KV, Q / KV, C]
    probs = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.matmul(probs.to(v.dtype), v)


def _repair(out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> None:
    """Computes again, in place, what is not finite in out: a sequence's own NaN or infinity reaches no token before
    it, whose keys and values other sequences may share.

    out, q: [B, Q, t, D]; k, v: [B, KV, C, D]; visible: [B, 1, t, C].
    """
    groups = q.shape[1] // k.shape[1]
    for i in (~out.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist():
        keys, values = (x[i].float().repeat_interleave(groups, dim=0) for x in (k, v))  # [Q, C, D]
        wild = ~values.isfinite()
        tame, wild_weights = values.masked_fill(wild, 0), wild.float()
        size = max(1, MAX_GATHERED_BYTES // (4 * q.shape[1] * k.shape[2]))  # queries at a time: [Q, size, C] float32
        for first in range(0, q.shape[2], size):
            rows, seen, repaired = (x[i, :, first : first + size] for x in (q, visible, out))
            scores = torch.matmul(rows.float(), keys.transpose(-1, -2)) * scale
            exact = torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), tame)
            exact.masked_fill_(torch.matmul(seen.float(), wild_weights) > 0, torch.nan)
            repaired.copy_(torch.where(repaired.isfinite(), repaired, exact.to(out.dtype)))


def _alike(query_lens: Sequence[int], context_lens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits the sequences into groups that are padded to at most twice their lengths and gather at most max_tokens
    of context (one sequence may have more). Returns their indices."""
    groups: list[list[int]] = []
    longest = most_queries = 0
    for i in sorted(range(len(query_lens)), key=lambda i: (query_lens[i], context_lens[i]), reverse=True):
        longest_with = max(longest, context_lens[i])
        if (
            not groups
            or 2 * query_lens[i] <= most_queries
            or 2 * min(context_lens[i], context_lens[groups[-1][-1]]) < longest_with
            or longest_with * (len(groups[-1]) + 1) > max_tokens
        ):
            groups.append([])
            longest_with, most_queries = context_lens[i], query_lens[i]
        groups[-1].append(i)
        longest = longest_with
    return groups


def _group(batch: PagedBatch, chosen: list[int], *, block_size: int, num_kv_heads: int) -> _Group:
    device = batch.block_tables.device
    query_lens, context_lens = ([lens[i] for i in chosen] for lens in (batch.query_lens, batch.context_lens))
    starts = [0]
    for query_len in batch.query_lens:
        starts.append(starts[-1] + query_len)
    num_queries, context = max(query_lens), max(context_lens)
    first_rows = torch.tensor([starts[i] for i in chosen]).unsqueeze(1)  # [B, 1]
    lens, ends = (torch.tensor(lengths).unsqueeze(1) for lengths in (query_lens, context_lens))
    offsets = torch.arange(num_queries).expand(len(chosen), -1)  # [B, t]
    clipped = torch.minimum(offsets, lens - 1)
    padded = min(query_lens) < num_queries
    tables = batch.block_tables[torch.tensor(chosen, device=device)]  # [B, n]
    keys = torch.arange(context, device=device)
    slots = tables[:, keys // block_size] * block_size + keys % block_size  # [B, C]
    slots = torch.where(keys < ends.to(device), slots, batch.padding_block * block_size)
    heads = torch.arange(num_kv_heads, device=device).view(1, -1, 1)
    return _Group(
        batch=len(chosen),
        num_queries=num_queries,
        context=context,
        query_rows=(first_rows + clipped).flatten().to(device),
        real=(offsets < lens).flatten().to(device) if padded else None,
        positions=(ends - lens + clipped).to(device),
        cache_rows=(slots.unsqueeze(1) * num_kv_heads + heads).flatten(),
        causal=not padded and query_lens == context_lens and min(context_lens) == context,
    )
