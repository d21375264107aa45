"""The memory of keys and values, in blocks. Knows no sequences: the block manager counts, this holds.

S: tokens a block, KV: key/value heads, D: head size.
"""

import numpy as np
import torch
from torch import Tensor

from cluster.config import DTYPE_BYTES, EngineConfig, ModelConfig
from cluster.errors import SetupError
from cluster.kernels.attention import reads_whole_blocks


class KVCache:
    """keys, values: [layers, blocks + 1, S, KV, D], allocated once.

    padding_block: the last one. It stays zero, and is read where a sequence has no token.
    reads_whole_blocks: as in `cluster.kernels.attention`; who writes must then `clear`.
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
        self.reads_whole_blocks = reads_whole_blocks(device, dtype)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, each [blocks, S, KV, D]."""
        return self.keys[layer_id], self.values[layer_id]

    def clear(self, slots: np.ndarray) -> None:
        """Writes zeros into slots [n]: past a sequence's end its last block holds what an earlier owner left."""
        if len(slots):
            index = torch.from_numpy(slots).to(self.keys.device)
            for cache in (self.keys, self.values):
                cache.flatten(1, 2).index_fill_(1, index, 0)


def num_kv_blocks(config: ModelConfig, engine: EngineConfig, dtype: str) -> int:
    """How many blocks fit in kv_cache_bytes. Raises SetupError when not even one does."""
    assert dtype in DTYPE_BYTES
    block_bytes = engine.block_size * config.kv_bytes_per_token(dtype)
    if engine.kv_cache_bytes < block_bytes:
        raise SetupError(
            f"kv_cache_bytes is {engine.kv_cache_bytes}, one block of {engine.block_size} tokens takes {block_bytes}: "
            "give more memory or a smaller block_size"
        )
    return engine.kv_cache_bytes // block_bytes
