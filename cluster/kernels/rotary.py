"""Rotary embedding of a step's queries and keys, whose keys and values go to the cache: its definition, and the kernels
for CPU and GPU.

T: tokens, Q: query heads, KV: key/value heads, D: head size, S: tokens a block.
"""

import torch
from torch import Tensor

from cluster.kernels import gpu
from cluster.kernels.cache_rows import LARGEST, row_width
from cluster.kernels.native.library import CACHE_DTYPES, DTYPES, Native, native
from cluster.kernels.native_products import threads_for
from cluster.kernels.paged import write_kv

Pair = tuple[Tensor, Tensor]


def rotate_to_cache(qkv: Tensor, rotary: Pair, cache: Pair, slot_mapping: Tensor) -> Tensor:
    """As `rotate_to_cache_reference`, by a kernel where there is one. It may write over qkv."""
    if gpu.runs_on(qkv):
        from cluster.kernels.gpu.fused import rotate_and_write

        return rotate_and_write(qkv, rotary, cache, slot_mapping)
    kernels = native() if qkv.device.type == "cpu" else None
    alike = all(part.dtype == qkv.dtype for part in rotary) and slot_mapping.dtype == torch.int64
    alike &= cache[0].dtype == cache[1].dtype and cache[0].dtype in (qkv.dtype, *LARGEST)
    in_place = qkv.stride(1) == cache[0].stride(3) == 1 and slot_mapping.is_contiguous()
    if kernels is None or qkv.dtype not in DTYPES or not (alike and in_place):
        return rotate_to_cache_reference(qkv, rotary, cache, slot_mapping)
    return rotate_to_cache_natively(kernels, qkv, rotary, cache, slot_mapping)


def rotate_to_cache_reference(qkv: Tensor, rotary: Pair, cache: Pair, slot_mapping: Tensor) -> Tensor:
    """Rotates queries and keys, writes keys and values in place. Returns the queries [T, Q, D].

    qkv: [T, (Q + 2 KV) D], queries, keys, values; rotary: cos and sin, each [T, 1, D]; cache: keys and values, each
    [blocks, S, KV, width of a row]; slot_mapping: [T] int64.
    """
    num_kv_heads, head_dim = cache[0].shape[2], rotary[0].shape[-1]
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // head_dim, head_dim)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    write_kv(*cache, k, v, slot_mapping)
    return q


def rotate_to_cache_natively(native: Native, qkv: Tensor, rotary: Pair, cache: Pair, slot_mapping: Tensor) -> Tensor:
    """In one call, with the same bits. The queries are rotated in place and returned as a part of qkv."""
    (cos, sin), (k_cache, v_cache) = rotary, cache
    num_rows, width = qkv.shape
    (_, block_size, num_kv_heads, _), head_dim = k_cache.shape, cos.shape[-1]
    assert k_cache.shape[-1] == row_width(head_dim, k_cache.dtype)
    num_heads = width // head_dim - 2 * num_kv_heads
    block_stride, token_stride, head_stride, _ = k_cache.stride()
    assert block_stride == block_size * token_stride
    assert k_cache.stride() == v_cache.stride()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    native.rotate_to_cache(
        DTYPES[qkv.dtype], CACHE_DTYPES[k_cache.dtype], qkv.data_ptr(), qkv.stride(0), cos.data_ptr(), sin.data_ptr(),
        slot_mapping.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), token_stride, head_stride,
        num_rows, num_heads, num_kv_heads, head_dim, threads_for(0, 32 * qkv.numel()),
    )  # fmt: skip
    return qkv[:, : num_heads * head_dim].view(num_rows, num_heads, head_dim)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half. x: [T, heads, D]; cos, sin: [T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
