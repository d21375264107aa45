"""The model families that can be computed, by their config's `model_type`: one line each."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from cluster.checkpoint.names import dense_shapes
from cluster.checkpoint.opening import Checkpoint
from cluster.checkpoint.spans import spans_of
from cluster.config import ModelConfig
from cluster.config.quantization import Quantization
from cluster.config.tensor_parallel import Share, Span
from cluster.kernels.parts import PartWeight
from cluster.kernels.stored import weight_of
from cluster.kernels.weights import MakeWeight, Parts, WeightLoader, weight_maker
from cluster.model.decoder import CausalLM
from cluster.model.layers.linear import Linear
from cluster.model.layers.rope import RotaryEmbedding
from cluster.model.qwen2 import qwen2
from cluster.model.qwen2_moe import qwen2_moe

MODELS: Mapping[str, Callable[[ModelConfig], CausalLM]] = {
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
}


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives each parameter of a model on the meta device memory of its own, without values and without gradients.

    `to_empty` does the same with torch's Python references of the meta device, which import sympy: 0.25 s and 35 MB."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))


def load_model(
    reader: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    quantization: Quantization | None = None,
    share: Share | None = None,
) -> CausalLM:
    """Reads all but the routed experts, each tensor into its place, or into the memory that its weight is made from.

    Downloads their files before, where they are elsewhere. progress: called with the bytes of each piece of both.
    share: reads a rank's part alone; give the model its `ranks` then.
    Raises CheckpointError.
    """
    config = reader.config if share is None else share.config
    spans: dict[str, Span] = {} if share is None else spans_of(share, reader.config)
    reader.fetch(dense_shapes(config), progress)
    with torch.device("meta"):
        model = MODELS[config.model_type](config).to(dtype)
    allocate(model.eval(), device)
    weights, plain_targets = [], model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            name = path.rpartition(".")[2]
            prefix = path.removesuffix(name)
            parts = module.parts(prefix)
            make: MakeWeight = weight_maker(dtype, device)
            if quantization is not None and all(map(quantization.takes, parts)):
                make = _rounded(parts, spans, quantization, dtype, device)
            module.allocate(make, dtype=dtype, device=device)
            weights.append((module.weight, parts))
            plain_targets |= module.bias_targets(prefix)
    WeightLoader(lambda targets: reader.load(targets, progress, spans)).load(weights, plain_targets)
    model.rotary = RotaryEmbedding(config.rope, config.head_dim).to(device)  # in float32, whatever the weights are in
    return model


def _rounded(
    parts: Parts, spans: dict[str, Span], quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> MakeWeight:
    """Removes the spans of matrices that a rank has to read whole."""
    of_parts = {name: spans.get(f"{name}.weight") for name in parts}
    if not any(span is not None and quantization.needs_whole(span.dim) for span in of_parts.values()):
        return partial(weight_of, quantization=quantization, dtype=dtype, device=device)
    for name in parts:
        spans.pop(f"{name}.weight", None)
    return partial(PartWeight, parts=parts, spans=of_parts, quantization=quantization, dtype=dtype, device=device)
