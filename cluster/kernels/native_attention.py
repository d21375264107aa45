"""Attention on the CPU: sequences with few new tokens by a native kernel over the blocks where they lie, the others by
`GroupedAttention`.

T: new tokens of all sequences, B: sequences, Q: query heads, KV: key/value heads, D: head size, S: tokens a block.
"""

import torch
from torch import Tensor

from cluster.kernels.grouped_attention import GroupedAttention, GroupedPlan
from cluster.kernels.native.library import CACHE_DTYPES, DTYPES, Native
from cluster.kernels.native_products import threads_for
from cluster.kernels.paged import PagedBatch

# New tokens of a sequence up to which the native kernel is the faster one. 4 sequences of 1024 tokens in bfloat16, 28
# heads on 4, one thread of a Zen 5: it takes 0.27, 0.35, 0.61 and 0.70 of the other's time for 2, 4, 8 and 16 of them
# with AVX-512, 0.37, 0.46, 0.81 and 1.03 with AVX2.
MOST_QUERIES = 8


class NativeAttention:
    """An `AttentionKernel`. grouped: for sequences of more than most_queries new tokens."""

    reads_whole_blocks = False

    def __init__(self, native: Native, grouped: GroupedAttention, *, most_queries: int = MOST_QUERIES) -> None:
        self.native = native
        self.most_queries = most_queries
        self._grouped = grouped
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def plan(self, batch: PagedBatch) -> "NativePlan":
        longer = [i for i, query_len in enumerate(batch.query_lens) if query_len > self.most_queries]
        return NativePlan(self, batch, self._grouped.plan(batch, longer) if longer else None)

    def scratch(self, num_bytes: int) -> Tensor:
        """At least so many bytes for one call at a time."""
        if num_bytes > len(self._scratch):
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._scratch


class NativePlan:
    """An `AttentionPlan`. longer: of the sequences that the native kernel leaves, None where it takes all."""

    def __init__(self, kernel: NativeAttention, batch: PagedBatch, longer: GroupedPlan | None) -> None:
        self.slot_mapping = batch.slot_mapping
        self._kernel = kernel
        self._longer = longer
        self._num_sequences = len(batch.query_lens)
        self._only_longer = longer is not None and longer.num_sequences == self._num_sequences
        self._tables = batch.block_tables.contiguous()
        self._context_lens = batch.context_lens_tensor
        self._query_lens = torch.tensor(batch.query_lens, dtype=torch.int64)
        self._num_tokens = sum(batch.context_lens)
        self._most_queries = min(kernel.most_queries, max(batch.query_lens, default=0))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None) -> Tensor:
        """As `AttentionPlan.attend`."""
        out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
        if self._longer is not None:
            self._longer.attend_into(out, q, k_cache, v_cache, scale=scale, window=window)
        if self._num_sequences and not self._only_longer:
            self._attend_natively(out, q, k_cache, v_cache, scale=scale, window=window)
        return out

    def _attend_natively(
        self, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None
    ) -> None:
        _, num_heads, head_dim = q.shape
        if q.stride()[1:] != (head_dim, 1):
            q = q.contiguous()
        block_size, num_kv_heads = k_cache.shape[1:3]
        assert k_cache.stride() == v_cache.stride()
        assert k_cache.stride(3) == 1
        native, dtype, stored = self._kernel.native, DTYPES[q.dtype], CACHE_DTYPES[k_cache.dtype]
        threads = threads_for(2 * self._num_tokens * num_kv_heads * k_cache.stride(2) * k_cache.element_size(), 0)
        lens = self._query_lens.data_ptr(), self._context_lens.data_ptr(), self._num_sequences, self._most_queries
        scratch = self._kernel.scratch(native.attention_scratch(stored, *lens, num_heads, head_dim, threads))
        native.attention(
            dtype, stored, q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3],
            self._tables.data_ptr(), self._tables.stride(0), *lens, num_heads, num_kv_heads, head_dim, block_size,
            scale, window or 0, out.data_ptr(), out.stride(0), scratch.data_ptr(), threads,
        )  # fmt: skip
