"""Grouped-query attention of one layer. Attribute names are the checkpoint's.

T: tokens, H: hidden size, Q: query heads, KV: key/value heads, D: head size.
"""

from torch import Tensor, nn

from cluster.config import ModelConfig
from cluster.kernels.paged import AttentionPlan
from cluster.kernels.rotary import rotate_to_cache
from cluster.model.layers.linear import Linear
from cluster.model.layers.lora import LayerAdapters


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window(layer_id)
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        outputs = {"q_proj": query_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv_proj = Linear(config.hidden_size, outputs, bias=config.qkv_bias)
        self.o_proj = Linear(query_width, {"o_proj": config.hidden_size})

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        adapters: LayerAdapters | None = None,
    ) -> Tensor:
        """x: [T, H]; rotary: cos and sin, each [T, 1, D]; cache: one layer's keys and values, written in place."""
        qkv = self.qkv_proj(x)
        if adapters is not None:
            adapters.add("self_attn.qkv_proj", x, qkv)
        q = rotate_to_cache(qkv, rotary, cache, plan.slot_mapping)  # [T, Q, D]
        out = plan.attend(q, *cache, scale=self.head_dim**-0.5, window=self.window).flatten(1)
        projected: Tensor = self.o_proj(out)
        if adapters is not None:
            adapters.add("self_attn.o_proj", out, projected)
        return projected
