"""Matrices that a checkpoint has in GPTQ's form, kept in 4 bits as they are. Knows no layers and no files.

N: outputs, K: inputs, G: groups of inputs.
"""

import torch
from torch import Tensor

from cluster.config.gptq import Gptq
from cluster.config.quantization import Quantization, RowLayout
from cluster.errors import CheckpointError
from cluster.kernels.quantized import QuantizedWeight
from cluster.kernels.rounding import Numbers
from cluster.kernels.weights import Parts, TwoProducts, Weight

_ALIGNMENT = 16  # bytes; of each tensor in staging memory
_MAX_PARTS = 3  # matrices one above another: query, key and value
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_MIDDLE = 8  # a number less this is from -8 to 7

Stored = dict[str, dict[str, Tensor]]  # by the layer's name, then by the end of the tensor's


class GptqWeight(QuantizedWeight):
    """Its targets are the checkpoint's tensors, each part's in staging memory. `settle` raises CheckpointError for
    numbers that the form cannot take."""

    def __init__(self, num_outputs: int, layout: RowLayout, gptq: Gptq) -> None:
        super().__init__(num_outputs, layout, torch.float16)
        self._gptq = gptq
        self.staging_bytes = _staging_bytes(num_outputs, layout, gptq)
        self._stored: Stored = {}

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        found, self._stored = _targets(self._gptq, self.num_inputs, parts, staging)
        return found

    def settle(self) -> None:
        read = [_read(self._gptq, self.layout, layer, tensors)[0] for layer, tensors in self._stored.items()]
        self._stored = {}
        numbers, scales, zeros = (torch.cat(tensors) for tensors in zip(*read, strict=True))
        self.fill(_numbers(numbers, scales, zeros, self.layout))


class OrderedGptqWeight(TwoProducts):
    """Of `desc_act`: each part has its inputs in an order of its own, and a product for itself. As GptqWeight."""

    def __init__(self, num_outputs: int, layout: RowLayout, gptq: Gptq) -> None:
        self._layout, self._gptq = layout, gptq
        self.staging_bytes = _staging_bytes(num_outputs, layout, gptq)
        self._stored: Stored = {}
        self._parts: list[tuple[QuantizedWeight, Tensor]] = []  # and which input comes first, second, …: [K] int64

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes + order.nbytes for weight, order in self._parts)

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        found, self._stored = _targets(self._gptq, self._layout.num_inputs, parts, staging)
        return found

    def settle(self) -> None:
        self._parts = []
        for layer, tensors in self._stored.items():
            read, order = _read(self._gptq, self._layout, layer, tensors)
            weight = QuantizedWeight(len(read[0]), self._layout, torch.float16)
            weight.fill(_numbers(*read, self._layout))
            self._parts.append((weight, order))
        self._stored = {}

    def padded(self, num_rows: int) -> int:
        return num_rows

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.cat([weight.product(x.index_select(1, order)) for weight, order in self._parts], dim=1)
        return out if bias is None else out + bias


def _staging_bytes(num_outputs: int, layout: RowLayout, gptq: Gptq) -> int:
    num_groups = gptq.num_groups(layout.num_inputs)
    of_outputs = num_outputs * (layout.num_inputs // 2 + num_groups * 4 + num_groups // 2 + 1)
    return of_outputs + _MAX_PARTS * (4 * layout.num_inputs + 4 * _ALIGNMENT)


def _targets(gptq: Gptq, num_inputs: int, parts: Parts, staging: Tensor) -> tuple[dict[str, Tensor], Stored]:
    """The tensors by their names, and again by their layer and what they are of it."""
    found, stored, begin = {}, Stored(), 0
    for layer, num_outputs in parts.items():
        stored[layer] = {}
        for name, shape in gptq.shapes(layer, num_outputs, num_inputs).items():
            end = name.rpartition(".")[2]
            tensor = _part(staging, begin, shape, torch.float32 if end == "scales" else torch.int32)
            begin = -(-(begin + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
            found[name] = stored[layer][end] = tensor
    return found, stored


def _read(
    gptq: Gptq, layout: RowLayout, layer: str, tensors: dict[str, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Numbers [N, K] int8, scales [N, G] float32 and zeros [N, G] int8, as of `Numbers`, the groups of `layout`; and
    the order of the inputs, [K] int64. Raises CheckpointError."""
    groups, num_inputs = tensors["g_idx"], layout.num_inputs
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], torch.arange(num_inputs, dtype=torch.int32) // (gptq.group_size or num_inputs)):
        raise CheckpointError(f"{layer}.g_idx does not give each group its inputs: download it again")
    if not gptq.desc_act and not torch.equal(order, torch.arange(num_inputs)):
        raise CheckpointError(f"{layer}.g_idx has its inputs in another order, and config.json no desc_act")
    numbers = _unpacked(tensors["qweight"].T).index_select(1, order)  # [N, K]
    scales = tensors["scales"].T.contiguous()  # [N, G]
    zeros = _unpacked(tensors["qzeros"]).T + gptq.zero_shift - _MIDDLE  # [N, G]
    if not layout.has_zeros and bool(zeros.any()):
        raise CheckpointError(f"{layer}.qzeros has other zeros than config.json's sym means: download both again")
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{layer}.scales has numbers that are not finite: download it again")
    if not gptq.group_size:
        repeats = -(-num_inputs // layout.group_size)
        scales, zeros = (each.repeat_interleave(repeats, 1) for each in (scales, zeros))
    return ((numbers - _MIDDLE).to(torch.int8), scales, zeros.to(torch.int8)), order


def _numbers(numbers: Tensor, scales: Tensor, zeros: Tensor, layout: RowLayout) -> Numbers:
    factors = _factors(scales)
    halves = (scales / factors.unsqueeze(1)).half()
    return Numbers(numbers, factors, halves, zeros if layout.has_zeros else None)


def _part(staging: Tensor, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return staging[begin : begin + num_bytes].view(dtype).view(shape)


def _unpacked(words: Tensor) -> Tensor:
    """[M, W] int32 -> [M, 8 W] int32, each from 0 to 15."""
    return ((words.unsqueeze(-1) >> _SHIFTS) & 15).flatten(1)


def _factors(scales: Tensor) -> Tensor:
    """Powers of two, one a row of [N, G]: 1 where float16 has the scales as they are."""
    largest = scales.abs().amax(dim=1)
    fitting = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp_min(-100))
    return torch.where((scales.half().float() == scales).all(dim=1), 1.0, fitting)


def quantized_weight(
    num_outputs: int, num_inputs: int, *, quantization: Quantization, dtype: torch.dtype
) -> QuantizedWeight:
    """dtype: of the checkpoint's matrix, where that is a plain one. Not of `desc_act`."""
    layout = quantization.layout(num_inputs)
    if quantization.gptq is not None:
        return GptqWeight(num_outputs, layout, quantization.gptq)
    return QuantizedWeight(num_outputs, layout, dtype)


def ordered_weight(num_outputs: int, num_inputs: int, *, quantization: Quantization) -> OrderedGptqWeight:
    assert quantization.gptq is not None
    return OrderedGptqWeight(num_outputs, quantization.layout(num_inputs), quantization.gptq)


def weight_of(num_outputs: int, num_inputs: int, *, quantization: Quantization, dtype: torch.dtype) -> Weight:
    """One of the two. dtype: as of `quantized_weight`."""
    if quantization.is_ordered:
        return ordered_weight(num_outputs, num_inputs, quantization=quantization)
    return quantized_weight(num_outputs, num_inputs, quantization=quantization, dtype=dtype)
