"""Qwen2-MoE without its routed experts, which each micro-batch brings along. Attribute names are the checkpoint's.

T: tokens of all sequences in a step, H: hidden size, V: vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ModelConfig
from cluster.kernels.attention import PagedBatch
from cluster.kernels.linear import pack_linears, packs
from cluster.model.kv_cache import KVCache
from cluster.model.layers.attention import Attention
from cluster.model.layers.moe import MLP, Experts, SparseMoe
from cluster.model.layers.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A part of a step's sequences, and where their routed rows are computed. token_ids, positions: [T] int64."""

    token_ids: Tensor
    positions: Tensor
    paged: PagedBatch
    experts: Experts


class RMSNorm(nn.Module):
    """Computed in float32, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.mlp: SparseMoe | MLP = (
            SparseMoe(config, layer_id)
            if config.is_sparse(layer_id)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def begin(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        batch: PagedBatch,
        experts: Experts,
    ) -> Callable[[], Tensor]:
        """x: [T, H]. Computes up to where routed rows are waited for; the result waits and gives the layer's [T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, batch)
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SparseMoe):
            finish = self.mlp.begin(y, experts)
            return lambda: x + finish()
        out: Tensor = x + self.mlp(y)
        return lambda: out


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2Moe(nn.Module):
    """The dense half of the model. Build it with `load`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @classmethod
    def load(
        cls,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int], None] | None = None,
    ) -> "Qwen2Moe":
        """Reads the dense tensors only, each straight into its place; then packs them where that is faster.

        Raises CheckpointError.
        """
        with torch.device("meta"):
            model = cls(reader.config).to(dtype)
        model = model.to_empty(device=device).eval().requires_grad_(False)
        reader.load(model.state_dict(), progress)
        if packs(dtype, device):
            pack_linears(model)
        model.rotary = RotaryEmbedding(reader.config.rope, reader.config.head_dim).to(device)
        return model

    rotary: RotaryEmbedding

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> Tensor:
        """Writes the cache. Returns the normed hidden states [T, H] of all micro-batches, in their order.

        With several, one computes attention while the rows of another are at their experts.
        Raises what the experts raise; the cache then holds a half-written step, which a repeat overwrites.
        """
        dtype = self.model.norm.weight.dtype
        rotary = [self.rotary(part.positions, dtype) for part in micro_batches]
        finish: list[Callable[[], Tensor]] = [
            partial(self.model.embed_tokens, part.token_ids) for part in micro_batches
        ]
        for layer_id, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            kv = cache.layer(layer_id)
            for i, part in enumerate(micro_batches):
                finish[i] = layer.begin(finish[i](), rotary[i], kv, part.paged, part.experts)
        rows = [wait() for wait in finish]
        normed: Tensor = self.model.norm(rows[0] if len(rows) == 1 else torch.cat(rows))
        return normed

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, V] in the model's dtype."""
        if self.lm_head is None:
            return F.linear(hidden_states, self.model.embed_tokens.weight)
        logits: Tensor = self.lm_head(hidden_states)
        return logits
