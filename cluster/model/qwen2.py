"""Dense Qwen2: every layer has a SwiGLU."""

from cluster.config import ModelConfig
from cluster.model.decoder import CausalLM, DecoderLayer
from cluster.model.layers.feed_forward import MLP


def qwen2(config: ModelConfig) -> CausalLM:
    """Builds the model; its weights are not filled."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return CausalLM(config, [DecoderLayer(config, i, MLP(hidden, inner)) for i in range(config.num_hidden_layers)])
