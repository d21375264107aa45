"""Attention of new tokens over a paged cache. Knows neither layers nor who owns the blocks.

T: new tokens of all sequences, B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size,
C: tokens of context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Where a step's tokens stand. The sequences' new tokens lie one after another in the T rows.

    query_lens: new tokens of each sequence.  context_lens: its tokens in the cache once the new ones are written.
    block_tables: [B, most blocks of any sequence] int64, padded with any valid block.
    slot_mapping: [T] int64, block * S + offset of each new token.
    context_lens_tensor: [B] int64, on the device.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Tensor
    slot_mapping: Tensor
    context_lens_tensor: Tensor


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys and values in place. k_cache, v_cache: [blocks, S, KV, D]; k, v: [T, KV, D]."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention written out, one sequence at a time: the definition that the fast path must match.

    q: [T, Q, D].  window: a token sees itself and window - 1 tokens before it; None for all.
    Returns [T, Q, D] in q's dtype.
    """
    out = torch.empty_like(q)
    start = 0
    for i, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        k, v = (_gather(cache, batch.block_tables[i : i + 1])[0, :context_len] for cache in (k_cache, v_cache))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # [C, Q, D]
        rows = q[start : start + query_len]
        scores = torch.einsum("tqd,cqd->qtc", rows.float(), k.float()) * scale  # [Q, t, C]
        visible = causal_mask(query_len, context_len, window, q.device)
        probs = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[start : start + query_len] = torch.einsum("qtc,cqd->tqd", probs, v.float()).to(q.dtype)
        start += query_len
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, *, scale: float, window: int | None
) -> Tensor:
    """As `attention_reference`: decode rows of all sequences in one product, each prefill chunk in one of its own."""
    out = torch.empty_like(q)
    starts, decodes, start = [], [], 0
    for i, query_len in enumerate(batch.query_lens):
        starts.append(start)
        if query_len == 1:
            decodes.append(i)
        start += query_len
    if decodes:
        every = len(decodes) == len(batch.query_lens)
        chosen = torch.tensor(decodes, device=q.device)
        rows = chosen if every else torch.tensor([starts[i] for i in decodes], device=q.device)
        tables = batch.block_tables if every else batch.block_tables[chosen]
        lens = batch.context_lens_tensor if every else batch.context_lens_tensor[chosen]
        out[rows] = _decode(q[rows], k_cache, v_cache, tables, lens, scale, window)
    for i, query_len in enumerate(batch.query_lens):
        if query_len > 1:
            chunk = slice(starts[i], starts[i] + query_len)
            table = batch.block_tables[i : i + 1]
            out[chunk] = _prefill(q[chunk], k_cache, v_cache, table, batch.context_lens[i], scale, window)
    return out


def causal_mask(query_len: int, context_len: int, window: int | None, device: torch.device) -> Tensor:
    """[query_len, context_len] bool, true where a query sees a key; the queries are the last tokens of the context."""
    queries = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    keys = torch.arange(context_len, device=device).unsqueeze(0)
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def _gather(cache: Tensor, block_tables: Tensor) -> Tensor:
    """[blocks, S, KV, D] by [B, n] -> [B, n * S, KV, D]."""
    return cache[block_tables].flatten(1, 2)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """One query a sequence. q: [B, Q, D], block_tables: [B, n], context_lens: [B]. Returns [B, Q, D]."""
    k, v = (_gather(cache, block_tables).transpose(1, 2) for cache in (k_cache, v_cache))  # [B, KV, C, D]
    num_sequences, num_heads, head_dim = q.shape
    grouped = q.view(num_sequences, k.shape[1], -1, head_dim)  # [B, KV, Q / KV, D]: no copy of keys for their group
    if q.device.type == "cpu" and q.dtype != torch.float32 and grouped.shape[2] == 1:
        # A single row of 16 bits takes torch's slow path: 13.9 ms, twice the same row 3.6 (32 x 16 heads, 96 tokens).
        grouped = grouped.expand(-1, -1, 2, -1)
    keys = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
    visible = keys < context_lens.unsqueeze(1)  # [B, C]
    if window is not None:
        visible &= keys >= context_lens.unsqueeze(1) - window
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None, :], scale=scale)
    return out[:, :, : num_heads // k.shape[1]].reshape(num_sequences, num_heads, head_dim)


def _prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_len: int,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """One chunk of one sequence. q: [t, Q, D], block_table: [1, n]. Returns [t, Q, D]."""
    k, v = (_gather(cache, block_table)[:, :context_len].transpose(1, 2) for cache in (k_cache, v_cache))
    whole = window is None and q.shape[0] == context_len
    mask = None if whole else causal_mask(q.shape[0], context_len, window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)
