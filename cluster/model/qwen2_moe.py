"""Qwen2-MoE: layers with routed and shared experts, and dense ones between them where the config says so."""

from cluster.config import ModelConfig
from cluster.model.decoder import CausalLM, DecoderLayer
from cluster.model.layers.feed_forward import MLP, FeedForward
from cluster.model.layers.moe import SparseMoe


def qwen2_moe(config: ModelConfig) -> CausalLM:
    """Builds the model; its weights are not filled."""
    layers = range(config.num_hidden_layers)
    return CausalLM(config, [DecoderLayer(config, i, _feed_forward(config, i)) for i in layers])


def _feed_forward(config: ModelConfig, layer_id: int) -> FeedForward:
    if config.moe is not None and config.is_sparse(layer_id):
        return SparseMoe(config.moe, config.hidden_size, layer_id)
    return MLP(config.hidden_size, config.intermediate_size)
