"""Linear layers: every product of a decode step but the routed experts'. M: rows, N: outputs, K: inputs."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.kernels.reading import num_turns
from cluster.config import ModelConfig
from cluster.kernels import native_products
from cluster.kernels.native.library import Native
from cluster.kernels.weights import PackedWeight, native_for, packs


def product_cases(
    config: ModelConfig, dtype: torch.dtype, batches: tuple[int, ...], kernels: Mapping[str, Native]
) -> Iterator[Case]:
    """Each layer's weights are made when its first case is asked for."""
    native = native_for(dtype, torch.device("cpu"))
    chosen = TORCH if native is None else native.variant
    for name, (num_outputs, num_inputs) in shapes_of(config).items():
        count = num_turns(num_outputs * num_inputs * dtype.itemsize)
        weights = [torch.randn(num_outputs, num_inputs, dtype=dtype) for _ in range(count)]
        packed = [pack(weight) for weight in weights] if packs(dtype, torch.device("cpu")) else []
        for batch in batches:
            x = torch.randn(batch, num_inputs, dtype=dtype)
            ways: dict[str, Call] = {TORCH: _plain(weights, x)}
            if packed:
                ways[f"{TORCH} packed"] = _of_packed(packed, x)
            ways |= {variant: _native(native, weights, x) for variant, native in kernels.items()}
            yield Case(
                kernel=f"{name}, {num_outputs} x {num_inputs}",
                size=f"batch {batch}",
                ways=ways,
                num_bytes=weights[0].nbytes,
                num_flops=2.0 * batch * weights[0].numel(),
                chosen=chosen,
            )


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """N and K, as `model/layers/` joins them."""
    width = config.num_attention_heads * config.head_dim
    inner = config.intermediate_size if config.moe is None else config.moe.shared_expert_intermediate_size
    mlp = "mlp" if config.moe is None else "shared expert"
    return {
        "qkv": (width + 2 * config.num_key_value_heads * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, width),
        f"{mlp}, gate and up": (2 * inner, config.hidden_size),
        f"{mlp}, down": (config.hidden_size, inner),
        "lm_head": (config.vocab_size, config.hidden_size),
    }


def pack(weight: Tensor) -> PackedWeight:
    """In oneDNN's layout."""
    packed = PackedWeight(*weight.shape)
    staging = torch.empty(packed.staging_bytes, dtype=torch.uint8)
    [target] = packed.targets({"weight": weight.shape[0]}, staging).values()
    target.copy_(weight)
    packed.settle()
    return packed


def _plain(weights: list[Tensor], x: Tensor) -> Call:
    return lambda turn: F.linear(x, weights[turn % len(weights)])


def _of_packed(weights: list[PackedWeight], x: Tensor) -> Call:
    return lambda turn: weights[turn % len(weights)].product(x)


def _native(native: Native, weights: list[Tensor], x: Tensor) -> Call:
    return lambda turn: native_products.linear(native, x, weights[turn % len(weights)], None)
