"""The memory of keys and values, in blocks. Knows no sequences: the block manager counts, this holds.

S: tokens a block, KV: key/value heads, D: head size.
"""

import torch
from torch import Tensor

from cluster.config import DTYPE_BYTES, EngineConfig, ModelConfig
from cluster.errors import SetupError


class KVCache:
    """keys, values: [layers, blocks, S, KV, D], allocated once."""

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
            num_blocks,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        # Zeros, not empty: a padded block is read (and masked), and NaN times zero is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, each [blocks, S, KV, D]."""
        return self.keys[layer_id], self.values[layer_id]


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
