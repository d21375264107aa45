"""Decode attention over a paged cache: one new token of each sequence.

B: sequences, S: tokens a block, Q: query heads, KV: key/value heads, D: head size.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.kernels.reading import num_turns
from cluster.config import DEFAULTS, ModelConfig
from cluster.config.kv_cache import EIGHT_BITS
from cluster.kernels.cache_rows import cache_torch_dtype, packed
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.native.library import Native, native
from cluster.kernels.native_attention import NativeAttention
from cluster.kernels.paged import AttentionKernel, PagedBatch

_MOST_BYTES = 2 << 30  # of a case's caches: larger ones are left out
_LAYERS = 32  # so many layers' caches at most, where a batch is small

Cache = tuple[Tensor, Tensor]


def left_out(config: ModelConfig, dtype: torch.dtype, batches: tuple[int, ...], contexts: tuple[int, ...]) -> list[str]:
    """The cases that `attention_cases` leaves out, each in a sentence that says why."""
    found = []
    for batch in batches:
        for context in contexts:
            num_bytes, count = _caches(config, dtype, batch, context)
            if count * num_bytes > _MOST_BYTES:
                found.append(
                    f"attention, batch {batch}, context {context} is left out: its keys and values take "
                    f"{count * num_bytes / 1e9:.3g} GB, more than {_MOST_BYTES / 1e9:.3g}"
                )
    return found


def _caches(config: ModelConfig, dtype: torch.dtype, batch: int, context: int) -> tuple[int, int]:
    """The bytes of a layer's keys and values, and the number of layers to visit in turn."""
    num_bytes = 2 * batch * context * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return num_bytes, min(num_turns(num_bytes), _LAYERS)


def attention_cases(
    config: ModelConfig,
    dtype: torch.dtype,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    kernels: Mapping[str, Native],
) -> Iterator[Case]:
    """The caches of several layers, visited in turn, each sequence's blocks in any order; then the same in 8 bits, with
    the cache in dtype beside them."""
    chosen = native()
    heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys"
    now = TORCH if chosen is None else chosen.variant
    for batch in batches:
        for context in contexts:
            row_bytes = config.num_key_value_heads * config.head_dim * dtype.itemsize
            num_bytes, count = _caches(config, dtype, batch, context)
            if count * num_bytes > _MOST_BYTES:
                continue
            paged, caches = make_paged(config, dtype, batch, context, count)
            _, block_size, num_kv_heads, _ = caches[0][0].shape
            grouped = GroupedAttention(block_size=block_size, num_kv_heads=num_kv_heads, row_bytes=row_bytes)
            q = torch.randn(batch, config.num_attention_heads, config.head_dim, dtype=dtype)
            ways: dict[str, Call] = {TORCH: _step(grouped, paged, q, caches)}
            ways |= {name: _step(NativeAttention(one, grouped), paged, q, caches) for name, one in kernels.items()}
            size = f"batch {batch}, context {context}"
            flops = 4.0 * batch * context * config.num_attention_heads * config.head_dim
            yield Case(
                kernel=f"attention, {heads}", size=size, ways=ways, num_bytes=num_bytes, num_flops=flops, chosen=now
            )
            for name in EIGHT_BITS:
                form = cache_torch_dtype(name)
                rows = [(packed(k, form).view(form), packed(v, form).view(form)) for k, v in caches]
                eight: dict[str, Call] = {TORCH: _step(grouped, paged, q, rows)}
                eight |= {way: _step(NativeAttention(one, grouped), paged, q, rows) for way, one in kernels.items()}
                eight["plain cache"] = ways[now]
                yield Case(
                    kernel=f"attention in {name}, {heads}", size=size, ways=eight, num_bytes=0, num_flops=0, chosen=now
                )


def make_paged(
    config: ModelConfig, dtype: torch.dtype, batch: int, context: int, num_layers: int
) -> tuple[PagedBatch, list[Cache]]:
    """A step's places, and the keys and values of each layer, [blocks, S, KV, D] each."""
    block_size = int(DEFAULTS["block_size"])
    blocks_each = -(-context // block_size)
    num_blocks = batch * blocks_each + 1
    draw = torch.Generator().manual_seed(context)
    tables = torch.randperm(num_blocks - 1, generator=draw).view(batch, blocks_each)
    newest = tables[:, (context - 1) // block_size] * block_size + (context - 1) % block_size
    paged = PagedBatch(
        query_lens=[1] * batch,
        context_lens=[context] * batch,
        block_tables=tables,
        slot_mapping=newest,
        context_lens_tensor=torch.full((batch,), context),
        padding_block=num_blocks - 1,
    )
    shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
    return paged, [(_filled(shape, dtype), _filled(shape, dtype)) for _ in range(num_layers)]


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    cache = torch.randn(shape, dtype=dtype)
    cache[-1] = 0  # the padding block
    return cache


def _step(kernel: AttentionKernel, paged: PagedBatch, q: Tensor, caches: list[Cache]) -> Call:
    """A layer's attention; its plan is made once for all layers of a step, as the engine makes it."""
    plan = kernel.plan(paged)
    scale = q.shape[-1] ** -0.5
    return lambda turn: plan.attend(q, *caches[turn % len(caches)], scale=scale, window=None)
