"""Products of a batch with a layer's routed experts. Knows neither layers nor which shard it runs on.

T: tokens, H: hidden size, I: expert intermediate size, K: experts a token, L: experts of this set, N: (token, expert)
pairs that are computed here. An id below zero marks a pair that is computed elsewhere.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config.quantization import Quantization
from cluster.kernels import gpu, native_products
from cluster.kernels.grouping import group_pairs
from cluster.kernels.native import library
from cluster.kernels.native.library import Native
from cluster.kernels.quantized_experts import QuantizedStacks
from cluster.kernels.stack import rearranged
from cluster.kernels.stored import ordered_weight, quantized_weight
from cluster.kernels.weights import NativeWeight, PlainWeight, Weight, native_for, weight_maker


@dataclass(frozen=True, slots=True)
class NativeStep:
    """Where a native loop finds the experts' weights, while these live.

    most_pairs: from so many (token, expert) pairs on torch computes.
    """

    pointers: native_products.ExpertPointers
    most_pairs: int


class ExpertWeights(Protocol):
    """L experts, each a pair of weights: gate above up [2I, H], and down [H, I]."""

    @property
    def gate_up(self) -> Sequence[Weight]: ...

    @property
    def down(self) -> Sequence[Weight]: ...

    def rearranged(self, places: Sequence[int | None]) -> Self:
        """Returns other experts: for each of them its place here, or None for one whose weights are yet to be filled.
        These stay what they are."""

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As `experts_reference`."""

    @property
    def native_step(self) -> NativeStep | None:
        """None where no native kernel computes a step, or there is no expert."""


W = TypeVar("W", bound=Weight)


class SeparateExperts(Generic[W]):
    """For the CPU. Each weight is a tensor by itself, which `rearranged` shares."""

    def __init__(self, make_gate_up: Callable[[], W], make_down: Callable[[], W]) -> None:
        self._make_gate_up, self._make_down = make_gate_up, make_down
        self.gate_up: Sequence[W] = ()
        self.down: Sequence[W] = ()

    @property
    def native_step(self) -> NativeStep | None:
        return None

    def rearranged(self, places: Sequence[int | None]) -> Self:
        other = copy(self)
        other.gate_up = [self._make_gate_up() if place is None else self.gate_up[place] for place in places]
        other.down = [self._make_down() if place is None else self.down[place] for place in places]
        return other

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return experts_by_loop(hidden_states, topk_ids, topk_weights, self.gate_up, self.down)


class NativeForm(Weight, Protocol):
    """A weight that the native kernels multiply with, unless there are torch_rows rows.

    matrix: as of `ExpertPointers`. form: 0 for a tensor, or of `RowLayout`. num_inputs: K.
    """

    matrix: Tensor
    torch_rows: int
    form: int
    num_inputs: int


class NativeExperts(SeparateExperts[NativeForm]):
    """A step is one call of the native kernels, unless so many rows go to each expert that torch is faster."""

    def __init__(
        self, make_gate_up: Callable[[], NativeForm], make_down: Callable[[], NativeForm], native: Native
    ) -> None:
        super().__init__(make_gate_up, make_down)
        self._native = native
        self.pointers = native_products.ExpertPointers([], [])

    @property
    def native_step(self) -> NativeStep | None:
        if not self.gate_up:
            return None
        torch_rows = min(self.gate_up[0].torch_rows, self.down[0].torch_rows)
        return NativeStep(self.pointers, torch_rows * len(self.gate_up))

    def rearranged(self, places: Sequence[int | None]) -> Self:
        other = super().rearranged(places)
        gate_up, down = ([weight.matrix for weight in side] for side in (other.gate_up, other.down))
        form, intermediate_size = next(((one.form, one.num_inputs) for one in other.down), (0, 0))
        other.pointers = native_products.ExpertPointers(gate_up, down, form=form, intermediate_size=intermediate_size)
        return other

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        step = self.native_step
        if step is None:
            return torch.zeros(hidden_states.shape, dtype=torch.float32)
        if topk_ids.numel() < step.most_pairs or int((topk_ids >= 0).sum()) < step.most_pairs:
            return native_products.experts(self._native, hidden_states, topk_ids, topk_weights, step.pointers)
        return super().forward(hidden_states, topk_ids, topk_weights)


class StackedExperts:
    """For the GPU. The weights stand side by side in memory, and `rearranged` copies them.

    gate_up_proj: [L, 2I, H].  down_proj: [L, H, I].
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self._gate_up_proj, self._down_proj = gate_up_proj, down_proj
        self.gate_up = [PlainWeight(matrix) for matrix in gate_up_proj]
        self.down = [PlainWeight(matrix) for matrix in down_proj]
        self._has_triton = gate_up_proj.is_cuda and gpu.available()

    @property
    def native_step(self) -> NativeStep | None:
        return None

    def rearranged(self, places: Sequence[int | None]) -> "StackedExperts":
        return StackedExperts(rearranged(self._gate_up_proj, places), rearranged(self._down_proj, places))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if self._has_triton:
            from cluster.kernels.gpu.experts import (
                experts_in_triton as product,  # a second, and only GPUs have a use for it
            )
        else:
            product = experts_by_grouped_mm
        return product(hidden_states, topk_ids, topk_weights, self._gate_up_proj, self._down_proj)


def no_experts(
    hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, device: torch.device,
    quantization: Quantization | None = None,
) -> ExpertWeights:  # fmt: skip
    """An empty set, quantized or in the form that is multiplied fastest here."""
    gate_up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    if device.type == "cuda":
        if quantization is not None:
            return QuantizedStacks.empty(gate_up, down, quantization=quantization, dtype=dtype, device=device)
        return StackedExperts(*(torch.empty(0, *shape, dtype=dtype, device=device) for shape in (gate_up, down)))
    if quantization is not None:
        if quantization.is_ordered:
            make_ordered = partial(ordered_weight, quantization=quantization)
            return SeparateExperts(partial(make_ordered, *gate_up), partial(make_ordered, *down))
        make = partial(quantized_weight, quantization=quantization, dtype=dtype)
        kernels = library.native()
        if kernels is not None:
            return NativeExperts(partial(make, *gate_up), partial(make, *down), kernels)
        return SeparateExperts(partial(make, *gate_up), partial(make, *down))
    native = native_for(dtype, device)
    if native is not None:
        make_native = partial(NativeWeight.empty, dtype=dtype, native=native)
        return NativeExperts(partial(make_native, *gate_up), partial(make_native, *down), native)
    make_other = weight_maker(dtype, device)
    return SeparateExperts(partial(make_other, *gate_up), partial(make_other, *down))


def experts_reference(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Weighted sum of each token's experts, one pair at a time: the plain definition that the fast paths must match.

    hidden_states: [T, H].  topk_ids: [T, K] int64, indices into the L experts or negative.  topk_weights: [T, K]
    float32.  gate_up_proj: [L, 2I, H], gate above up.  down_proj: [L, H, I].  Returns [T, H] float32.
    """
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for token, ids in enumerate(topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2)
                out[token] += topk_weights[token, slot] * F.linear(F.silu(gate) * up, down_proj[expert]).float()
    return out


def experts_by_loop(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
) -> Tensor:
    """The CPU's path: one pair of products for each active expert, whose weights are read once. As the reference.

    gate_up, down: as of `ExpertWeights`, all of one form.
    Sums run in the order of the expert ids, so the result does not depend on how the batch is ordered.
    """
    pair_tokens, order, counts = group_pairs(topk_ids, len(gate_up))
    pair_weights = topk_weights.flatten().index_select(0, order).unsqueeze(1)  # [T*K, 1]
    active = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
    num_pairs = sum(count for _, count in active)
    pair_tokens = pair_tokens[:num_pairs]
    # Where more rows are wanted than an expert has, those behind it stand in, and at the end any.
    spare = max((gate_up[0].padded(count) - count for _, count in active), default=0)
    with_spare = F.pad(pair_tokens, (0, spare))
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, count in active:
        rows = hidden_states.index_select(0, with_spare[start : start + gate_up[0].padded(count)])
        gate, up = gate_up[expert].product(rows).chunk(2, dim=-1)  # [rows, I]
        y = down[expert].product(F.silu(gate).mul_(up))[:count]
        pairs = slice(start, start + count)
        out.index_add_(0, pair_tokens[pairs], y * pair_weights[pairs])  # the product is float32
        start += count
    return out


def experts_by_grouped_mm(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """A GPU's path without Triton: two grouped products for all experts, no look at device values from the host. As the
    reference.

    Pairs that are computed elsewhere are grouped behind the last expert and multiplied by no weights.
    """
    num_local = gate_up_proj.shape[0]
    pair_tokens, order, counts = group_pairs(topk_ids, num_local)
    pair_weights = topk_weights.flatten().index_select(0, order).unsqueeze(1)  # [T*K, 1]
    offsets = counts.cumsum(0).to(torch.int32)  # [L]
    x = hidden_states.index_select(0, pair_tokens)  # [T*K, H]
    gate, up = F.grouped_mm(x, gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=offsets)  # [T*K, H]
    here = (torch.arange(y.shape[0], device=y.device) < offsets.select(0, -1)).unsqueeze(
        1
    )  # rows past it were never written
    y = torch.where(here, y.float() * pair_weights, 0.0)
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    return out.index_add_(0, pair_tokens, y)
