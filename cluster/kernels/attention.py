"""Chooses the attention that is fastest over a cache."""

import logging

import torch
from torch import Tensor

from cluster.kernels import gpu
from cluster.kernels.cache_rows import LARGEST
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.native.library import CACHE_DTYPES, missing_because, native
from cluster.kernels.native_attention import NativeAttention
from cluster.kernels.paged import AttentionKernel
from cluster.kernels.varlen_attention import VarlenAttention

log = logging.getLogger(__name__)


def make_attention(k_cache: Tensor, num_heads: int) -> AttentionKernel:
    """k_cache: [blocks, S, KV, width of a row], one layer's; all layers' are shaped alike.  num_heads: of queries."""
    _, block_size, num_kv_heads, width = k_cache.shape
    in_8_bits = k_cache.dtype in LARGEST
    assert not (in_8_bits and k_cache.is_cuda), "check_cache_device refuses it"
    if k_cache.is_cuda and gpu.available():
        from cluster.kernels.gpu.attention import PagedAttention  # a second, and only GPUs have a use for it

        return PagedAttention(num_heads // num_kv_heads)
    if k_cache.is_cuda and k_cache.dtype != torch.float32:
        return VarlenAttention()
    row_bytes = num_kv_heads * width * (4 if in_8_bits else k_cache.element_size())  # copied in 32 bits at most
    grouped = GroupedAttention(block_size=block_size, num_kv_heads=num_kv_heads, row_bytes=row_bytes)
    if k_cache.device.type != "cpu":
        return grouped
    kernels = native()
    if kernels is not None and k_cache.dtype in CACHE_DTYPES:
        return NativeAttention(kernels, grouped)
    because = f"they take no {k_cache.dtype}" if kernels is not None else missing_because() or "they are switched off"
    log.info("Attention runs without the native kernels: %s", because)
    return grouped
