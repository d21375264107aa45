"""A cache's rows, one token's keys or values of one head each: as they are, or in 8 bits with a scale of their own.

A cache in 8 bits is a tensor of int8 or float8_e4m3fn, [blocks, S, KV, D + 2]: D numbers, then the bytes of a scale in
bfloat16, by which they are multiplied. Rows of zero bytes are zeros. The definition: the native kernels write the same
bytes (`rope.inc`).

Each row has a scale because keys of different layers, heads and tokens differ by orders of magnitude (Qwen2's have
biases), and because a row that depends on nothing but itself is the same in every batch, whatever chunk of a prompt
brought it. In bfloat16 it has float32's range in two bytes; beside its numbers it comes from memory with them.

S: tokens a block, KV: key/value heads, D: head size.
"""

import torch
from torch import Tensor

from cluster.config.kv_cache import SCALE_BYTES

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the numbers of a row, by the cache's dtype
_LEAST_SCALE = 2.0**-126  # float32's least normal number, whose inverse is finite
_NAN = 0x7FC0  # in bfloat16


def cache_torch_dtype(name: str) -> torch.dtype:
    """name: as of `EngineConfig.cache_dtype`."""
    found: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    return found


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row of a cache of this dtype."""
    return head_dim + SCALE_BYTES if dtype in LARGEST else head_dim


def as_bytes(cache: Tensor) -> Tensor:
    """A cache in 8 bits seen as int8, which torch copies by index; another as it is."""
    return cache.view(torch.int8) if cache.dtype in LARGEST else cache


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows for a cache of this dtype, as `as_bytes` sees it. x: [.., D], finite or not; D is even.

    In 8 bits a number is that nearest to x / scale, ties to even; the scale is the least bfloat16 that keeps the row's
    largest within LARGEST. A row with a number that is not finite gets the scale NaN: it is NaN throughout.
    """
    if dtype not in LARGEST:
        return x
    numbers = x.float()
    largest = numbers.abs().amax(dim=-1, keepdim=True)
    is_finite = largest.isfinite()
    scale = (largest / LARGEST[dtype]).clamp(min=_LEAST_SCALE)
    factor = (scale.view(torch.int32) + 0xFFFF) >> 16  # up to the next bfloat16
    scale = (factor << 16).view(torch.float32)
    scaled = torch.where(is_finite, numbers * scale.reciprocal(), 0.0)
    codes = scaled.round().to(torch.int8) if dtype == torch.int8 else scaled.to(dtype).view(torch.int8)
    factor = torch.where(is_finite, factor, _NAN)
    return torch.cat((codes, factor.to(torch.int8), (factor >> 8).to(torch.int8)), dim=-1)


def unpacked(rows: Tensor, cache_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rows of a cache as `as_bytes` sees it -> numbers [.., D]; those in 8 bits come in `dtype`, rounded once."""
    if cache_dtype not in LARGEST:
        return rows
    head_dim = rows.shape[-1] - SCALE_BYTES
    codes, scale = rows[..., :head_dim], rows[..., head_dim:].view(torch.bfloat16)
    if cache_dtype == torch.float8_e4m3fn:
        # Its bits, the sign apart, stand in float16 for a 2^8th of it. torch's own conversion takes 5 ns for each.
        halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        return halves.view(torch.float16).float().mul_(scale.float().mul_(256)).to(dtype)
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # either holds 8 whole bits exactly
    return codes.to(wide).mul_(scale.to(wide)).to(dtype)


def gather_rows(cache: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [n] of a cache [blocks, S, KV, width], counted head by head -> [n, D], as of `unpacked`."""
    found = as_bytes(cache).view(-1, cache.shape[-1]).index_select(0, rows)
    return unpacked(found, cache.dtype, dtype)


def write_rows(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Writes the numbers x [n, KV, D] at slots [n] of a cache [blocks, S, KV, width], in place."""
    as_bytes(cache).view(-1, *cache.shape[2:]).index_copy_(0, slots, packed(x, cache.dtype))
