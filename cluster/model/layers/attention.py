"""Grouped-query attention of one layer. Attribute names are the checkpoint's.

T: tokens, H: hidden size, Q: query heads, KV: key/value heads, D: head size.
"""

from torch import Tensor, nn

from cluster.config import ModelConfig
from cluster.kernels.attention import PagedBatch, paged_attention, write_kv
from cluster.kernels.linear import PackedLinear
from cluster.model.layers.rope import apply_rotary


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window(layer_id)
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj: nn.Linear | PackedLinear = nn.Linear(query_width, config.hidden_size, bias=False)
        self.qkv_proj: PackedLinear | None = None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], batch: PagedBatch
    ) -> Tensor:
        """x: [T, H]; rotary: cos and sin, each [T, 1, D]; cache: one layer's keys and values, written in place."""
        q, k, v = (part.view(x.shape[0], -1, self.head_dim) for part in self._project(x))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)  # [T, Q, D], [T, KV, D]
        write_kv(*cache, k, v, batch.slot_mapping)
        out = paged_attention(q, *cache, batch, scale=self.head_dim**-0.5, window=self.window)
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected

    def pack(self) -> None:
        """Packs the loaded weights; queries, keys and values become one product."""
        self.qkv_proj = PackedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = PackedLinear(self.o_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, H] -> [T, Q * D], [T, KV * D], [T, KV * D]."""
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        parts: tuple[Tensor, ...] = self.qkv_proj(x).split(self.qkv_proj.sizes, dim=1)
        return parts
