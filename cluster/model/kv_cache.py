"""The memory of keys and values, in blocks. Knows no sequences: the block manager counts the blocks.

S: tokens a block, KV: key/value heads, W: elements of a row: a head's numbers, and in 8 bits their scale
(`cluster/kernels/cache_rows.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import EngineConfig, ModelConfig
from cluster.kernels.cache_rows import as_bytes, cache_torch_dtype, row_width


class CacheGroup:
    """The blocks of one group of layers. keys, values: [layers, blocks + 1, S, KV, W], allocated once.

    padding_block: the last one. It stays zero, and is read where a sequence has no token. (The padded rows of a CUDA
    graph write there: the attention of graphs reads it for no other row.)
    """

    def __init__(
        self, shape: tuple[int, int, int], num_blocks: int, num_layers: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """shape: [S, KV, W]."""
        self.padding_block = num_blocks
        self.keys = torch.zeros(num_layers, num_blocks + 1, *shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def clear(self, slots: np.ndarray) -> None:
        """Writes zeros into slots [n]: past a sequence's end its last block holds what an earlier owner left, and some
        attention reads it (`AttentionKernel.reads_whole_blocks`)."""
        if len(slots):
            index = torch.from_numpy(slots).to(self.keys.device)
            for cache in (self.keys, self.values):
                as_bytes(cache).flatten(1, 2).index_fill_(1, index, 0)


class KVCache:
    """The memory of all layers, group by group as in `ModelConfig.layer_groups`.

    num_blocks: of each group, or of the only one.  group_of: the number of each layer's group.  dtype: of the cache.
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
        shape = block_size, config.num_key_value_heads, row_width(config.head_dim, dtype)
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
        """Views of one layer's keys and values, each [blocks, S, KV, W]."""
        number, row = self._places[layer_id]
        group = self.groups[number]
        return group.keys.select(0, row), group.values.select(0, row)


def cache_for(
    model: ModelConfig, engine: EngineConfig, num_blocks: Sequence[int], dtype: str, device: torch.device
) -> KVCache:
    """num_blocks: of each group of layers.  dtype: that of the weights."""
    stored = cache_torch_dtype(engine.cache_dtype(dtype))
    return KVCache(model, num_blocks, engine.block_size, dtype=stored, device=device)
