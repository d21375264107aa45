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
from cluster.kernels.weights import Parts

_ALIGNMENT = 16  # bytes; of each tensor in staging memory
_MAX_PARTS = 3  # matrices one above another: query, key and value
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_MIDDLE = 8  # a number less this is from -8 to 7


class GptqWeight(QuantizedWeight):
    """Its targets are the checkpoint's tensors, each part's in staging memory. `settle` raises CheckpointError for
    numbers that the form cannot take."""

    def __init__(self, num_outputs: int, layout: RowLayout, gptq: Gptq) -> None:
        super().__init__(num_outputs, layout, torch.float16)
        self._gptq = gptq
        num_inputs, num_groups = layout.num_inputs, gptq.num_groups(layout.num_inputs)
        of_outputs = num_outputs * (num_inputs // 2 + num_groups * 4 + num_groups // 2 + 1)
        self.staging_bytes = of_outputs + _MAX_PARTS * (4 * num_inputs + 4 * _ALIGNMENT)
        self._parts: dict[str, dict[str, Tensor]] = {}  # by the layer's name, then by the tensor's end

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        found, begin = {}, 0
        for layer, num_outputs in parts.items():
            self._parts[layer] = {}
            for name, shape in self._gptq.shapes(layer, num_outputs, self.num_inputs).items():
                end = name.rpartition(".")[2]
                dtype = torch.float32 if end == "scales" else torch.int32
                tensor = _part(staging, begin, shape, dtype)
                begin = -(-(begin + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
                found[name] = self._parts[layer][end] = tensor
        return found

    def settle(self) -> None:
        read = [self._read(layer, tensors) for layer, tensors in self._parts.items()]
        self._parts = {}
        numbers, scales, zeros = (torch.cat(tensors) for tensors in zip(*read, strict=True))
        factors = _factors(scales)
        halves = (scales / factors.unsqueeze(1)).half()
        self.fill(Numbers(numbers, factors, halves, zeros if self.layout.has_zeros else None))

    def _read(self, layer: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers [N, K] int8, scales [N, G] float32 and zeros [N, G] int8, as of `Numbers`, the groups of `layout`."""
        num_inputs, of_group = self.num_inputs, self._gptq.group_size or self.num_inputs
        if not torch.equal(tensors["g_idx"], torch.arange(num_inputs, dtype=torch.int32) // of_group):
            raise CheckpointError(
                f"{layer}.g_idx has its inputs in another order (desc_act): groups of neighbours alone are served"
            )
        numbers = _unpacked(tensors["qweight"].T)  # [N, K]
        scales = tensors["scales"].T.contiguous()  # [N, G]
        zeros = _unpacked(tensors["qzeros"]).T + self._gptq.zero_shift - _MIDDLE  # [N, G]
        if not self.layout.has_zeros and bool(zeros.any()):
            raise CheckpointError(f"{layer}.qzeros has other zeros than config.json's sym means: download both again")
        if not bool(scales.isfinite().all()):
            raise CheckpointError(f"{layer}.scales has numbers that are not finite: download it again")
        repeats = -(-num_inputs // self.layout.group_size) // scales.shape[1]
        if not self._gptq.group_size:
            scales, zeros = (each.repeat_interleave(repeats, 1) for each in (scales, zeros))
        return (numbers - _MIDDLE).to(torch.int8), scales, zeros.to(torch.int8)


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
    """dtype: of the checkpoint's matrix, where that is a plain one."""
    layout = quantization.layout(num_inputs)
    if quantization.gptq is not None:
        return GptqWeight(num_outputs, layout, quantization.gptq)
    return QuantizedWeight(num_outputs, layout, dtype)
