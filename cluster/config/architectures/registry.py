"""The model families that are served, by their config's `model_type`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.config.architectures.architecture import Architecture
from cluster.config.architectures.heads import read_head
from cluster.config.architectures.qwen2 import QWEN2
from cluster.config.architectures.qwen2_moe import QWEN2_MOE
from cluster.config.gptq import KEY, read_gptq
from cluster.config.json_keys import Keys, shown
from cluster.config.model import ModelConfig
from cluster.config.quantization import stored_quantization
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
    if not raw.get(KEY):
        return config
    gptq, symmetric = read_gptq(raw)
    return replace(config, stored=stored_quantization(gptq, symmetric=symmetric))


def architecture_of(config: ModelConfig) -> Architecture:
    """The family of a configuration that was read."""
    return ARCHITECTURES[config.model_type]
