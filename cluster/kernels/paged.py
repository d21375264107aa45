"""Attention of new tokens over a paged cache: its input, its definition, and how a fast one is called.

Knows neither layers nor who owns the blocks. A query gets nothing of a key or value that it does not see, whatever
stands there: a weight of zero times NaN is NaN, so a mask alone does not keep another sequence's numbers out. Padding
is read from a block of zeros.

T: new tokens of all sequences, B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cluster.kernels.cache_rows import as_bytes, unpacked, write_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """The places of a step's tokens. The sequences' new tokens lie one after another in the T rows.

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


class AttentionPlan(Protocol):
    """One batch's attention, for all layers of a step."""

    @property
    def slot_mapping(self) -> Tensor:
        """As of `PagedBatch`."""

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None) -> Tensor:
        """As `attention_reference`, over one layer's cache with the new keys and values in it."""


class AttentionKernel(Protocol):
    """A fast attention for caches of one shape. Used by one thread."""

    @property
    def reads_whole_blocks(self) -> bool:
        """Whether it may read a last block to its end, and multiply by zero what it finds past the sequence's end:
        zeros must stand there."""

    def plan(self, batch: PagedBatch) -> AttentionPlan:
        """Prepares what all layers have in common."""


@runtime_checkable
class PlansDecode(Protocol):
    """An attention whose plan may stay while the numbers in its tensors change: a CUDA graph can hold it."""

    def plan_decode(self, slots: Tensor, context_lens: Tensor, block_tables: Tensor, longest: int) -> AttentionPlan:
        """For one new token a sequence. slots, context_lens: [B]; block_tables: [B, n]; longest: of any context."""


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys and values in place. k_cache, v_cache: [blocks, S, KV, width of a row]; k, v: [T, KV, D]."""
    write_rows(k_cache, slot_mapping, k)
    write_rows(v_cache, slot_mapping, v)


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention written out, one query at a time: the definition that the fast paths must match.

    q: [T, Q, D].  window: a token sees itself and window - 1 tokens before it; None for all.
    Returns [T, Q, D] in q's dtype.
    """
    out = torch.empty_like(q)
    groups = q.shape[1] // k_cache.shape[2]
    row = 0
    for i, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        keys, values = (
            unpacked(as_bytes(cache)[batch.block_tables[i]].flatten(0, 1), cache.dtype, torch.float32)
            for cache in (k_cache, v_cache)
        )
        for position in range(context_len - query_len, context_len):
            seen = slice(max(0, position + 1 - (window or context_len)), position + 1)
            k, v = (x[seen].repeat_interleave(groups, dim=1).float() for x in (keys, values))  # [keys, Q, D]
            probs = (torch.einsum("qd,cqd->qc", q[row].float(), k) * scale).softmax(dim=-1)
            out[row] = torch.einsum("qc,cqd->qd", probs, v).to(q.dtype)
            row += 1
    return out
