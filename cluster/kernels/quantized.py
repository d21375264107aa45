"""Weights in 8 or 4 bits, multiplied as they are. Knows neither layers nor files; `rounding` says how they are rounded.

M: rows, N: outputs, K: inputs, H: hidden size, I: intermediate size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config.quantization import RowLayout
from cluster.config.stored import GROUP_SIZES
from cluster.kernels import gpu, large_pages, native_products
from cluster.kernels.large_pages import CPU
from cluster.kernels.native.library import DTYPES, native
from cluster.kernels.native_products import ExpertPointers
from cluster.kernels.rounding import Numbers, dequantize, pack, quantize, unpack
from cluster.kernels.weights import EVERY_ROW, Parts, TwoProducts, split_rows


class QuantizedWeight(TwoProducts):
    """A matrix that is rounded while it is loaded: read in `dtype` into staging memory, then packed. `fill` takes one
    that a checkpoint has in this form.

    matrix: its rows, [N, row_bytes] uint8, not filled, on the CPU or on a GPU.
    """

    torch_rows = EVERY_ROW

    def __init__(self, matrix: Tensor, layout: RowLayout, dtype: torch.dtype) -> None:
        self.matrix, self.layout = matrix, layout
        self.form, self.num_inputs = layout.form, layout.num_inputs
        self.staging_bytes = dtype.itemsize * len(matrix) * layout.num_inputs
        self._dtype = dtype
        self._staged = torch.empty(0)  # [N, K] of dtype, until `settle`

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        self._staged = staging[: self.staging_bytes].view(self._dtype).view(len(self.matrix), self.layout.num_inputs)
        return split_rows(self._staged, parts)

    def settle(self) -> None:
        with filling(self.matrix) as rows:
            fill_rows(rows, self._staged, self.layout)
        self._staged = torch.empty(0)

    def padded(self, num_rows: int) -> int:
        return num_rows

    def fill(self, numbers: Numbers, begin: int = 0) -> None:
        """Takes a matrix that is rounded already, as it is. begin: the first of its outputs here."""
        self.matrix[begin : begin + len(numbers.numbers)] = pack(numbers, self.layout)

    def dequantized(self) -> Tensor:
        """[N, K] float32, on the CPU."""
        return dequantize(unpack(self.matrix.cpu(), self.layout), self.layout)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[1] != self.num_inputs:
            raise ValueError(f"rows of {x.shape[1]} inputs do not fit a weight of {self.num_inputs}")
        if gpu.runs_on(x):
            from cluster.kernels.gpu.quantized import linear  # only GPUs have Triton

            return linear(x, self.matrix, self.layout, bias)
        kernels = native()
        if kernels is not None:
            return native_products.linear_quantized(kernels, x, self.matrix, bias, self.form)
        out = F.linear(x.float(), self.dequantized(), None if bias is None else bias.float())
        return out.to(x.dtype)

    def swiglu(self, x: Tensor, down: Self) -> Tensor:
        kernels = None if gpu.runs_on(x) else native()
        if kernels is not None:
            sizes = {"form": self.form, "intermediate_size": down.num_inputs}
            return native_products.swiglu(kernels, x, ExpertPointers([self.matrix], [down.matrix], **sizes))
        return super().swiglu(x, down)


def new_rows(num_outputs: int, layout: RowLayout, device: torch.device = CPU) -> Tensor:
    """[N, row_bytes] uint8, not filled."""
    return large_pages.empty(num_outputs, layout.row_bytes, dtype=torch.uint8, device=device)


@contextmanager
def filling(matrix: Tensor) -> Iterator[Tensor]:
    """The CPU's memory that a matrix is to be filled in: its own, or some that is copied to its device then."""
    rows = matrix if matrix.is_cpu else torch.empty_like(matrix, device="cpu")
    yield rows
    if rows is not matrix:
        matrix.copy_(rows)


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
