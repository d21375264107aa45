"""Dense Qwen2 and Qwen2.5. Source: transformers 5.24, Qwen2Config and Qwen2Model."""

from cluster.config.architectures.architecture import (
    Architecture,
    Shapes,
    attention_shapes,
    read_decoder,
    read_layer_types,
    swiglu_shapes,
)
from cluster.config.json_keys import Keys
from cluster.config.model import ModelConfig


def _read(keys: Keys) -> ModelConfig:
    """Queries, keys and values always have a bias here. With the window on, layers from `max_window_layers` slide."""
    layer_types = read_layer_types(keys, lambda layer_id, limit: layer_id >= limit)
    return read_decoder(keys, "qwen2", qkv_bias=True, layer_types=layer_types)


def _layer_shapes(config: ModelConfig, layer_id: int) -> Shapes:
    mlp = swiglu_shapes(f"model.layers.{layer_id}.mlp", config.hidden_size, config.intermediate_size)
    return attention_shapes(config, layer_id) | mlp


QWEN2 = Architecture(model_type="qwen2", class_name="Qwen2", read=_read, layer_shapes=_layer_shapes)
