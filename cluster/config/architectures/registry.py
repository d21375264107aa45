"""The model families that are served, by their config's `model_type`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.config.architectures.architecture import Architecture, Shapes
from cluster.config.architectures.heads import read_head
from cluster.config.architectures.qwen2 import QWEN2
from cluster.config.architectures.qwen2_moe import QWEN2_MOE
from cluster.config.json_keys import Keys, shown
from cluster.config.model import ModelConfig
from cluster.config.stored_forms import Matrices, read_stored
from cluster.errors import CheckpointError

ARCHITECTURES: Mapping[str, Architecture] = {
    family.model_type: family
    for family in (
        QWEN2,
        QWEN2_MOE,
    )
}  # fmt: skip


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed config.json. Raises CheckpointError that names the key, its value and what is needed."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json: model_type is {shown(model_type)}, one of {', '.join(sorted(ARCHITECTURES))} is needed"
        )
    family, keys = ARCHITECTURES[model_type], Keys(raw, "config.json")
    head = read_head(keys, family.class_name)
    config = replace(family.read(keys), head=head)
    return replace(config, stored=read_stored(raw, lambda: _matrices(family, config)))


def _matrices(family: Architecture, config: ModelConfig) -> Matrices:
    """The linear layers, `lm_head` apart."""
    shapes: Shapes = {}
    for layer_id in range(config.num_hidden_layers):
        shapes |= family.layer_shapes(config, layer_id)
        if family.expert_shapes is not None and config.is_sparse(layer_id):
            for expert_id in range(config.num_experts):
                shapes |= family.expert_shapes(config, layer_id, expert_id)
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def architecture_of(config: ModelConfig) -> Architecture:
    """The family of a configuration that was read."""
    return ARCHITECTURES[config.model_type]
