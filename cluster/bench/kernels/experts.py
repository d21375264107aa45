"""A layer's routed experts: a shard's whole step, from rows and their experts to weighted sums.

T: tokens, H: hidden size, I: expert intermediate size, K: experts a token.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.kernels.products import pack
from cluster.config import ModelConfig
from cluster.kernels import native_products
from cluster.kernels.experts import experts_by_loop
from cluster.kernels.native.library import Native
from cluster.kernels.weights import PlainWeight, Weight, native_for, packs

_DEVIATION = 0.02  # of weights, as models have it


def expert_cases(
    config: ModelConfig, dtype: torch.dtype, batches: tuple[int, ...], kernels: Mapping[str, Native]
) -> Iterator[Case]:
    """All experts of one layer, which are more than the caches hold, routed at random."""
    if config.moe is None:
        return
    moe, hidden = config.moe, config.hidden_size
    inner = moe.moe_intermediate_size
    gate_up = [torch.randn(2 * inner, hidden).mul_(_DEVIATION).to(dtype) for _ in range(moe.num_experts)]
    down = [torch.randn(hidden, inner).mul_(_DEVIATION).to(dtype) for _ in range(moe.num_experts)]
    torchs = [_torch_form(matrices, dtype) for matrices in (gate_up, down)]
    pointers = native_products.ExpertPointers(gate_up, down)
    native = native_for(dtype, torch.device("cpu"))
    for batch in batches:
        x = torch.randn(batch, hidden, dtype=dtype)
        routes = routings(batch, moe.num_experts, moe.num_experts_per_tok)
        active = len(set(routes[0].flatten().tolist()))
        ways: dict[str, Call] = {TORCH: _by_torch(x, routes, *torchs)}
        ways |= {name: _by_kernel(variant, x, routes, pointers) for name, variant in kernels.items()}
        yield Case(
            kernel=f"experts, {moe.num_experts} of {inner} x {hidden}",
            size=f"batch {batch}, {active} active",
            ways=ways,
            num_bytes=float(active * 3 * hidden * inner * dtype.itemsize),
            num_flops=2.0 * batch * moe.num_experts_per_tok * 3 * hidden * inner,
            chosen=TORCH if native is None else native.variant,
        )


def routings(num_tokens: int, num_experts: int, top_k: int) -> list[Tensor]:
    """Different experts for each turn, [T, K] int64 each. A turn's are those of the one before, moved on by as many as
    are active: each touches as many experts, and few that the one before has read."""
    draw = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(num_experts, generator=draw)[:top_k] for _ in range(num_tokens)])
    active = len(set(ids.flatten().tolist()))
    return [(ids + turn * active) % num_experts for turn in range(num_experts)]


def _torch_form(matrices: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Weight]:
    """The form in which torch multiplies them fastest here."""
    return [pack(matrix) if packs(dtype, matrix.device) else PlainWeight(matrix) for matrix in matrices]


def _by_torch(x: Tensor, routes: list[Tensor], gate_up: Sequence[Weight], down: Sequence[Weight]) -> Call:
    weights = _equal_weights(routes)
    return lambda turn: experts_by_loop(x, routes[turn % len(routes)], weights, gate_up, down)


def _by_kernel(native: Native, x: Tensor, routes: list[Tensor], pointers: native_products.ExpertPointers) -> Call:
    weights = _equal_weights(routes)
    return lambda turn: native_products.experts(native, x, routes[turn % len(routes)], weights, pointers)


def _equal_weights(routes: list[Tensor]) -> Tensor:
    return torch.full(routes[0].shape, 1 / routes[0].shape[1])
