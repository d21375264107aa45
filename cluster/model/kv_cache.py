"""The memory of keys and values, in blocks. Knows no sequences: the block manager counts the blocks.

S: tokens a block, KV: key/value heads, D: head size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import DTYPE_BYTES, EngineConfig, ModelConfig
from cluster.errors import SetupError

MIN_BYTES = 64 << 20  # of a cache without a size in the configuration, however little memory is free
UNKNOWN_BYTES = 1 << 30  # of such a cache on a machine whose free memory is unknown


class CacheGroup:
    """The blocks of one group of layers. keys, values: [layers, blocks + 1, S, KV, D], allocated once.

    padding_block: the last one. It stays zero, and is read where a sequence has no token. (The padded rows of a CUDA
    graph write there: the attention of graphs reads it for no other row.)
    """

    def __init__(
        self, shape: tuple[int, int, int], num_blocks: int, num_layers: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """shape: [S, KV, D]."""
        self.padding_block = num_blocks
        self.keys = torch.zeros(num_layers, num_blocks + 1, *shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def clear(self, slots: np.ndarray) -> None:
        """Writes zeros into slots [n]: past a sequence's end its last block holds what an earlier owner left, and some
        attention reads it (`AttentionKernel.reads_whole_blocks`)."""
        if len(slots):
            index = torch.from_numpy(slots).to(self.keys.device)
            for cache in (self.keys, self.values):
                cache.flatten(1, 2).index_fill_(1, index, 0)


class KVCache:
    """The memory of all layers, group by group as in `ModelConfig.layer_groups`.

    num_blocks: of each group, or of the only one.  group_of: the number of each layer's group.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int | Sequence[int],
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        counts = [num_blocks] if isinstance(num_blocks, int) else num_blocks
        shape = block_size, config.num_key_value_heads, config.head_dim
        self.groups = tuple(
            CacheGroup(shape, count, len(group.layer_ids), dtype=dtype, device=device)
            for group, count in zip(config.layer_groups, counts, strict=True)
        )
        places = {
            layer_id: (number, row)
            for number, group in enumerate(config.layer_groups)
            for row, layer_id in enumerate(group.layer_ids)
        }
        self._places = [places[layer_id] for layer_id in range(config.num_hidden_layers)]
        self.group_of = [number for number, _ in self._places]
        self.block_size = block_size
        self.device = device

    @property
    def num_bytes(self) -> int:
        """Of all blocks, without the padding blocks."""
        sizes = (group.keys[:, : group.padding_block].nbytes for group in self.groups)
        return 2 * sum(sizes)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, each [blocks, S, KV, D]."""
        number, row = self._places[layer_id]
        group = self.groups[number]
        return group.keys.select(0, row), group.values.select(0, row)


def num_kv_blocks(
    config: ModelConfig, engine: EngineConfig, dtype: str, *, max_model_len: int, room_bytes: int | None, share: float
) -> tuple[int, ...]:
    """Counts the blocks of each group of layers that fit in kv_cache_bytes, by default `share` of room_bytes.

    Every group gets the same number, but never more than max_num_seqs sequences of max_model_len tokens can use: where
    a window slides that is less, and the others share what is left.
    room_bytes: memory that is free once all weights are loaded, None if that is unknown.
    Raises SetupError when kv_cache_bytes has no room for one block.
    """
    check_block_fits(config, engine, dtype)
    cache_bytes = engine.kv_cache_bytes
    if cache_bytes is None:
        cache_bytes = UNKNOWN_BYTES if room_bytes is None else max(MIN_BYTES, int(room_bytes * share))
    groups = config.layer_groups
    block_bytes = [engine.block_size * config.kv_bytes_per_token(dtype, len(group.layer_ids)) for group in groups]
    useful = [
        engine.max_num_seqs * most_blocks(group.window, max_model_len, engine.max_num_batched_tokens, engine.block_size)
        for group in groups
    ]
    counts = [0] * len(groups)
    waiting = sorted(range(len(groups)), key=lambda i: useful[i])
    for place, i in enumerate(waiting):
        counts[i] = max(1, min(useful[i], cache_bytes // sum(block_bytes[j] for j in waiting[place:])))
        cache_bytes -= counts[i] * block_bytes[i]
    return tuple(counts)


def most_blocks(window: int | None, num_tokens: int, step_tokens: int, block_size: int) -> int:
    """Blocks of one group that a sequence holds at most until it has num_tokens tokens.

    window: as of `ModelConfig.window`.  step_tokens: that a step computes of a sequence at most.
    """
    every = -(-num_tokens // block_size)
    return every if window is None else min(every, -(-(window - 1 + step_tokens) // block_size) + 1)


def check_block_fits(config: ModelConfig, engine: EngineConfig, dtype: str) -> int:
    """Returns the bytes of a block. Raises SetupError if kv_cache_bytes is less."""
    assert dtype in DTYPE_BYTES
    block_bytes = engine.block_size * config.kv_bytes_per_token(dtype)
    if engine.kv_cache_bytes is not None and engine.kv_cache_bytes < block_bytes:
        raise SetupError(
            f"kv_cache_bytes is {engine.kv_cache_bytes}, one block of {engine.block_size} tokens takes {block_bytes}: "
            "give more memory or a smaller block_size"
        )
    return block_bytes
