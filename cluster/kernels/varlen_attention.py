"""torch's flash attention for sequences of any lengths at once: for GPUs in 16 bits.

T: new tokens of all sequences, B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cluster.kernels.paged import PagedBatch

log = logging.getLogger(__name__)


def varlen_attn(*args: Any, **options: Any) -> Tensor:
    """torch's, which loads with its first call: it takes 1.4 s, and a process on a CPU has no use for it."""
    from torch.nn.attention.varlen import varlen_attn as attend

    out = attend(*args, **options)
    assert isinstance(out, Tensor), "torch returns more than that only where it is asked to"
    return out


class VarlenAttention:
    """An `AttentionKernel`. It finds out in its first call whether this build of torch reads the cache's blocks in
    place (before 2.12 none does, and the block sizes that one takes are nowhere declared); else it copies them."""

    reads_whole_blocks = True

    def __init__(self, attend: Callable[..., Tensor] = varlen_attn) -> None:
        self._attend = attend
        self.reads_in_place = True

    def plan(self, batch: PagedBatch) -> "VarlenPlan":
        """Does not look at values on the device."""
        device = batch.block_tables.device
        cu_queries, cu_context = (
            torch.tensor([0, *accumulate(lens)], dtype=torch.int32).to(device, non_blocking=True)
            for lens in (batch.query_lens, batch.context_lens)
        )
        return VarlenPlan(
            kernel=self,
            slot_mapping=batch.slot_mapping,
            cu_queries=cu_queries,
            cu_context=cu_context,
            context_lens=batch.context_lens_tensor.to(torch.int32),
            block_tables=batch.block_tables.to(torch.int32),
            max_queries=max(batch.query_lens),
            max_context=max(batch.context_lens),
            total_context=sum(batch.context_lens),
        )

    def attend(
        self, plan: "VarlenPlan", q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """As `AttentionPlan.attend`. options: those of torch's function that say scale and window."""
        if self.reads_in_place:
            try:
                return self._attend(
                    q, k_cache, v_cache, plan.cu_queries, None, plan.max_queries, plan.max_context,
                    seqused_k=plan.context_lens, block_table=plan.block_tables, **options,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as error:
                log.warning("flash attention does not read the cache's blocks, they are copied for it: %s", error)
                self.reads_in_place = False
        slots = plan.slots(k_cache.shape[1])
        k, v = (cache.view(-1, *cache.shape[2:]).index_select(0, slots) for cache in (k_cache, v_cache))
        return self._attend(q, k, v, plan.cu_queries, plan.cu_context, plan.max_queries, plan.max_context, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenPlan:
    """An `AttentionPlan`. All tensors but slot_mapping are int32, on the device.

    cu_queries, cu_context: [B + 1], where each sequence begins.  block_tables: [B, n].  context_lens: [B].
    """

    kernel: VarlenAttention
    slot_mapping: Tensor
    cu_queries: Tensor
    cu_context: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_queries: int
    max_context: int
    total_context: int

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None) -> Tensor:
        """As `AttentionPlan.attend`. Does not look at values on the device."""
        options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
        if q.shape[1] != k_cache.shape[2]:
            options["enable_gqa"] = True  # before 2.12 there is no such option
        return self.kernel.attend(self, q, k_cache, v_cache, options)

    def slots(self, block_size: int) -> Tensor:
        """[sum of the contexts] int32: where in the cache each token of each context lies."""
        device = self.block_tables.device
        sequences = torch.arange(self.block_tables.shape[0], device=device)
        sequence = torch.repeat_interleave(sequences, self.context_lens, output_size=self.total_context)
        position = torch.arange(self.total_context, device=device) - self.cu_context[sequence]
        return self.block_tables[sequence, position // block_size] * block_size + position % block_size
