"""The memory of keys and values, in blocks. Knows no sequences: the block manager counts the blocks.

S: tokens a block, KV: key/value heads, D: head size.
"""

import numpy as np
import torch
from torch import Tensor

from cluster.config import DTYPE_BYTES, EngineConfig, ModelConfig
from cluster.errors import SetupError

MIN_BYTES = 64 << 20  # of a cache without a size in the configuration, however little memory is free
UNKNOWN_BYTES = 1 << 30  # of such a cache on a machine whose free memory is unknown


class KVCache:
    """keys, values: [layers, blocks + 1, S, KV, D], allocated once.

    padding_block: the last one. It stays zero, and is read where a sequence has no token. (The padded rows of a CUDA
    graph write there: the attention of graphs reads it for no other row.)
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            num_blocks + 1,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.padding_block = num_blocks
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, each [blocks, S, KV, D]."""
        return self.keys.select(0, layer_id), self.values.select(0, layer_id)

    def clear(self, slots: np.ndarray) -> None:
        """Writes zeros into slots [n]: past a sequence's end its last block holds what an earlier owner left, and some
        attention reads it (`AttentionKernel.reads_whole_blocks`)."""
        if len(slots):
            index = torch.from_numpy(slots).to(self.keys.device)
            for cache in (self.keys, self.values):
                cache.flatten(1, 2).index_fill_(1, index, 0)


def num_kv_blocks(
    config: ModelConfig, engine: EngineConfig, dtype: str, *, max_model_len: int, room_bytes: int | None, share: float
) -> int:
    """Counts the blocks that fit in kv_cache_bytes, by default `share` of room_bytes.

    Never more than max_num_seqs sequences of max_model_len tokens can use.
    room_bytes: memory that is free once all weights are loaded, None if that is unknown.
    Raises SetupError when kv_cache_bytes has no room for one block.
    """
    block_bytes = check_block_fits(config, engine, dtype)
    cache_bytes = engine.kv_cache_bytes
    if cache_bytes is None:
        cache_bytes = UNKNOWN_BYTES if room_bytes is None else max(MIN_BYTES, int(room_bytes * share))
    useful = engine.max_num_seqs * -(-max_model_len // engine.block_size)
    return max(1, min(useful, cache_bytes // block_bytes))


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
