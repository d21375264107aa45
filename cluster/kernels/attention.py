"""Chooses the attention that is fastest over a cache."""

import torch
from torch import Tensor

from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.paged import AttentionKernel
from cluster.kernels.varlen_attention import VarlenAttention


def make_attention(k_cache: Tensor) -> AttentionKernel:
    """k_cache: [blocks, S, KV, D], one layer's; all layers' are shaped alike."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    if k_cache.is_cuda and k_cache.dtype != torch.float32:
        return VarlenAttention()
    row_bytes = num_kv_heads * head_dim * k_cache.element_size()
    return GroupedAttention(block_size=block_size, num_kv_heads=num_kv_heads, row_bytes=row_bytes)
