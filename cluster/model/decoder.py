"""The decoder that model families share, without routed experts: each micro-batch brings those along.

Knows no family: one gives it its layers. Attribute names are the checkpoint's.
T: tokens of all sequences in a step, H: hidden size, V: vocabulary, L: labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.config import ModelConfig
from cluster.kernels.paged import AttentionPlan
from cluster.model.heads import head_layers
from cluster.model.kv_cache import KVCache
from cluster.model.layers.attention import Attention
from cluster.model.layers.feed_forward import Experts, FeedForward
from cluster.model.layers.lora import LayerAdapters
from cluster.model.layers.norm import RMSNorm
from cluster.model.layers.rope import RotaryEmbedding
from cluster.model.ranks import HeadAdapters, Ranks


class Adapters(Protocol):
    def layer(self, layer_id: int) -> LayerAdapters: ...

    def embed(self, token_ids: Tensor, out: Tensor) -> None:
        """Adds to `out` [T, H], the embeddings of token_ids [T], in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A part of a step's sequences, and where their routed rows are computed.

    token_ids, positions, lengths: [T] int64; lengths: as of `RotaryEmbedding.forward`.
    attention: of each group of layers, as in the cache.
    experts: None at a rank that leaves them to rank 0.
    adapters: of its rows; None where all rows are the base's.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: Tensor
    attention: Sequence[AttentionPlan]
    experts: Experts | None
    adapters: Adapters | None = None


Residual = tuple[Tensor, Tensor | None]  # [T, H] each: hidden states, and what the next norm is to add to them


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward half; each takes normed hidden states, and gives what is added to them."""

    def __init__(self, config: ModelConfig, layer_id: int, mlp: FeedForward) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def begin(
        self,
        residual: Residual,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        experts: Experts | None,
        *,
        adapters: LayerAdapters | None = None,
        ranks: Ranks | None = None,
    ) -> Callable[[], Residual]:
        """Computes up to where routed rows are waited for; the result waits and gives what the next layer takes.

        ranks: those among which each half is divided: its parts are added up, with routed rows among them."""
        x, normed = self.input_layernorm(*residual)
        attended = self.self_attn(normed, rotary, cache, plan, adapters)
        if ranks is not None:
            attended = ranks.sum(attended)
        x, normed = self.post_attention_layernorm(x, attended)
        finish = self.mlp.begin(normed, experts, adapters)
        return (lambda: (x, finish())) if ranks is None else lambda: (x, ranks.sum(finish()))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: what a checkpoint has below `model.`."""

    def __init__(self, config: ModelConfig, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        # Without values: to draw them on the meta device imports torch's compiler, a second of CPU and 150 MB.
        values = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=values)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder and its head. `cluster.model.registry.load_model` makes one, and gives it `rotary`.

    config: of a rank's part, where `ranks` divide the model.
    """

    rotary: RotaryEmbedding

    def __init__(self, config: ModelConfig, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        self.ranks: Ranks | None = None
        self._head = head_layers(config)  # at most one layer
        for name, layer in self._head.items():
            self.add_module(name, layer)

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> Tensor:
        """Writes the cache. Returns the normed hidden states [T, H] of all micro-batches, in their order.

        With several, one computes attention while the rows of another are at their experts.
        Raises what the experts raise; the cache then holds a half-written step, which a repeat overwrites.
        """
        dtype = self.model.norm.weight.dtype
        rotary = [self.rotary(part.positions, part.lengths, dtype) for part in micro_batches]
        finish: list[Callable[[], Residual]] = [partial(self._embed, part) for part in micro_batches]
        for layer_id, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            kv, group = cache.layer(layer_id), cache.group_of[layer_id]
            for i, part in enumerate(micro_batches):
                adapters = None if part.adapters is None else part.adapters.layer(layer_id)
                finish[i] = layer.begin(
                    finish[i](), rotary[i], kv, part.attention[group], part.experts, adapters=adapters, ranks=self.ranks
                )
        rows: list[Tensor] = [self.model.norm(*wait())[1] for wait in finish]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    @property
    def vocab_size(self) -> int:
        """Of all ranks together."""
        return self.config.vocab_size if self.ranks is None else self.ranks.share.vocab_size

    def _embed(self, part: MicroBatch) -> Residual:
        if self.ranks is not None:
            return self._embed_among(self.ranks, part), None
        x: Tensor = self.model.embed_tokens(part.token_ids)
        if part.adapters is not None:
            part.adapters.embed(part.token_ids, x)
        return x, None

    def _embed_among(self, ranks: Ranks, part: MicroBatch) -> Tensor:
        """[T, H]. Each rank has the rows of its tokens, and zeros for all others."""
        tokens, token_ids = ranks.share.tokens, part.token_ids
        places = (token_ids - tokens.start).clamp(0, len(tokens) - 1)
        x: Tensor = self.model.embed_tokens(places)
        if part.adapters is not None:
            part.adapters.embed(places, x)
        elsewhere = (token_ids < tokens.start) | (token_ids >= tokens.stop)
        return ranks.sum(x.masked_fill_(elsewhere.unsqueeze(1), 0))

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor, adapters: HeadAdapters | None = None) -> Tensor:
        """[T, H] -> [T, V] in the model's dtype: those of each row's next token.

        adapters: that change the head for some of the rows.
        """
        assert self.config.head.generates
        if self.ranks is not None:
            return self.ranks.logits(hidden_states, adapters, self._logits)
        return self._logits(hidden_states, adapters)

    def _logits(self, hidden_states: Tensor, adapters: HeadAdapters | None) -> Tensor:
        if not self._head:
            return F.linear(hidden_states, self.model.embed_tokens.weight)
        found = self._apply_head(hidden_states)
        if adapters is not None:
            adapters.add_logits(hidden_states, found)
        return found

    @torch.inference_mode()
    def label_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, L] in the model's dtype, of a head with L labels."""
        assert self.config.head.labels
        return self._apply_head(hidden_states)

    def _apply_head(self, hidden_states: Tensor) -> Tensor:
        [layer] = self._head.values()
        found: Tensor = layer(hidden_states)
        return found
