"""Weights in 8 or 4 bits, multiplied as they are. Knows neither layers nor files; `rounding` says how they are rounded.

M: rows, N: outputs, K: inputs, H: hidden size, I: intermediate size.
"""

import sys
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import SetupError
from cluster.kernels import native_products
from cluster.kernels.native.library import DTYPES, native
from cluster.kernels.native_products import ExpertPointers
from cluster.kernels.rounding import GROUP_SIZES, Numbers, RowLayout, dequantize, pack, quantize, unpack
from cluster.kernels.weights import Parts, TwoProducts, split_rows


class QuantizedWeight(TwoProducts):
    """A matrix that is rounded while it is loaded: read in `dtype` into staging memory, then packed. `fill` takes one
    that a checkpoint has in this form.

    matrix: its rows, [N, row_bytes] uint8.
    """

    min_rows = 1
    torch_rows = sys.maxsize

    def __init__(self, num_outputs: int, layout: RowLayout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.num_bits: int = layout.num_bits
        self.num_inputs = layout.num_inputs
        self.matrix = torch.empty(num_outputs, layout.row_bytes, dtype=torch.uint8)
        self.staging_bytes = dtype.itemsize * num_outputs * layout.num_inputs
        self._dtype = dtype
        self._staged = torch.empty(0)  # [N, K] of dtype, until `settle`

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        self._staged = staging[: self.staging_bytes].view(self._dtype).view(len(self.matrix), self.layout.num_inputs)
        return split_rows(self._staged, parts)

    def settle(self) -> None:
        fill_rows(self.matrix, self._staged, self.layout)
        self._staged = torch.empty(0)

    def fill(self, numbers: Numbers) -> None:
        """Takes a matrix that is rounded already, as it is."""
        self.matrix.copy_(pack(numbers, self.layout))

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        return dequantize(unpack(self.matrix, self.layout), self.layout)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        kernels = native()
        if kernels is not None:
            return native_products.linear_quantized(kernels, x, self.matrix, bias, self.layout.num_bits)
        out = F.linear(x.float(), self.dequantized(), None if bias is None else bias.float())
        return out.to(x.dtype)

    def swiglu(self, x: Tensor, down: Self) -> Tensor:
        kernels = native()
        if kernels is not None:
            sizes = {"num_bits": self.num_bits, "intermediate_size": down.num_inputs}
            return native_products.swiglu(kernels, x, ExpertPointers([self.matrix], [down.matrix], **sizes))
        return super().swiglu(x, down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How weights are rounded while they are loaded: those of attention, dense layers and experts. Never the router's,
    and not what has few weights; the embeddings and, unless asked for, the last layer stay as they are too.

    group_size, has_zeros: of 4 bits.
    """

    num_bits: Literal[4, 8]
    group_size: int = 0
    has_zeros: bool = False
    lm_head: bool = False

    def weight(self, num_outputs: int, num_inputs: int, *, dtype: torch.dtype) -> QuantizedWeight:
        return QuantizedWeight(
            num_outputs, RowLayout(self.num_bits, num_inputs, self.group_size, self.has_zeros), dtype
        )

    def takes(self, layer: str, num_outputs: int) -> bool:
        """Whether it is meant for a linear layer, by its name and size."""
        return self.lm_head if layer == "lm_head" else num_outputs > 1


def quantizations() -> dict[str, Quantization]:
    """By name: int8, int4 (groups of 128), int4-32, int4-64, int4-128; `-zeros` for those that are not symmetric;
    `+lm_head` for the last layer too."""
    forms = {"int8": Quantization(num_bits=8), "int4": Quantization(num_bits=4, group_size=128)}
    for size in GROUP_SIZES:
        forms[f"int4-{size}"] = Quantization(num_bits=4, group_size=size)
        forms[f"int4-{size}-zeros"] = Quantization(num_bits=4, group_size=size, has_zeros=True)
    return forms | {f"{name}+lm_head": replace(form, lm_head=True) for name, form in forms.items()}


def quantization_by_name(name: str) -> Quantization | None:
    """None for "". Raises SetupError for one that is not known."""
    known = quantizations()
    if name and name not in known:
        raise SetupError(f"quantization is {name!r}, one of {', '.join(known)} is needed")
    return known.get(name)


def fill_rows(rows: Tensor, matrix: Tensor, layout: RowLayout) -> None:
    """Rounds a matrix [N, K] to its rows, [N, row_bytes] uint8."""
    kernels = native()
    if kernels is None:
        rows.copy_(pack(quantize(matrix, layout), layout))
        return
    num_outputs, num_inputs = matrix.shape
    shift = GROUP_SIZES.index(layout.group_size) if layout.group_size else 0
    kernels.quantize(
        DTYPES[matrix.dtype], matrix.data_ptr(), matrix.stride(0), layout.num_bits, shift, layout.has_zeros,
        rows.data_ptr(), rows.stride(0), num_outputs, num_inputs, torch.get_num_threads(),
    )  # fmt: skip
