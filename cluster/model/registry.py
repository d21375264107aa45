"""The model families that can be computed, by their config's `model_type`: one line each."""

from collections.abc import Callable, Mapping

import torch

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ModelConfig
from cluster.kernels.linear import pack_linears, packs
from cluster.model.decoder import CausalLM
from cluster.model.layers.rope import RotaryEmbedding
from cluster.model.qwen2_moe import qwen2_moe

MODELS: Mapping[str, Callable[[ModelConfig], CausalLM]] = {
    "qwen2_moe": qwen2_moe,
}


def load_model(
    reader: CheckpointReader,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> CausalLM:
    """Reads all but the routed experts, each tensor straight into its place; then packs them where that is faster.

    Raises CheckpointError.
    """
    config = reader.config
    with torch.device("meta"):
        model = MODELS[config.model_type](config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    reader.load(model.state_dict(), progress)
    if packs(dtype, device):
        pack_linears(model)
    model.rotary = RotaryEmbedding(config.rope, config.head_dim).to(device)  # in float32, whatever the weights are in
    return model
