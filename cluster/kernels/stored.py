"""Matrices that a checkpoint has in fewer bits, kept in these bits as they are. Knows no layers and no files.

N: outputs, K: inputs, G: groups of inputs, J: matrices one above another.
"""

import math

import torch
from torch import Tensor

from cluster.config.quantization import Quantization, RowLayout, quantization_of
from cluster.config.stored import INTEGERS, SIZES, StoredForm
from cluster.errors import SetupError
from cluster.kernels import gpu
from cluster.kernels.large_pages import CPU
from cluster.kernels.nf4 import Nf4Weight
from cluster.kernels.quantized import QuantizedWeight, new_rows
from cluster.kernels.rounding import Numbers
from cluster.kernels.unpacking import StoredMatrix, read_matrix
from cluster.kernels.weights import Parts, TwoProducts, Weight

ALIGNMENT = 16  # bytes; of each tensor in staging memory
_MAX_PARTS = 3  # matrices one above another: query, key and value

Stored = dict[str, dict[str, Tensor]]  # by the layer's name, then by the end of the tensor's


class StoredWeight(QuantizedWeight):
    """Its targets are the checkpoint's tensors, each part's in staging memory. `settle` raises CheckpointError for
    numbers that the form cannot take."""

    def __init__(self, matrix: Tensor, layout: RowLayout, form: StoredForm) -> None:
        super().__init__(matrix, layout, torch.float16)
        self._form = form
        self.staging_bytes = _staging_bytes(len(matrix), layout.num_inputs, form)
        self._stored: Stored = {}

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        found, self._stored = _targets(self._form, self.num_inputs, parts, staging)
        return found

    def settle(self) -> None:
        begin = 0
        for layer, tensors in self._stored.items():
            read = read_matrix(self._form, layer, tensors, self.num_inputs)
            self.fill(numbers_of(read, self.layout), begin)
            begin += len(read.numbers)
        self._stored = {}


class OrderedWeight(TwoProducts):
    """Of a form that `is_ordered`: each part has its inputs in an order of its own, and a product for itself. As
    StoredWeight.

    orders: [J, K] int32, of each of J parts of one size the input that comes first, second, …; not filled. None where
    the parts are not known yet.
    """

    def __init__(self, matrix: Tensor, layout: RowLayout, form: StoredForm, orders: Tensor | None = None) -> None:
        self._matrix, self._layout, self._form = matrix, layout, form
        self.staging_bytes = _staging_bytes(len(matrix), layout.num_inputs, form)
        self._stored: Stored = {}
        self._parts: list[tuple[QuantizedWeight, Tensor]] = []
        if orders is not None:
            self._divide([len(matrix) // len(orders)] * len(orders), orders)

    def _divide(self, sizes: list[int], orders: Tensor) -> None:
        matrices = torch.split(self._matrix, sizes)
        weights = [QuantizedWeight(matrix, self._layout, torch.float16) for matrix in matrices]
        self._parts = list(zip(weights, orders, strict=True))

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes + sum(order.nbytes for _, order in self._parts)

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        if not self._parts:
            num_inputs, device = self._layout.num_inputs, self._matrix.device
            orders = torch.empty(len(parts), num_inputs, dtype=torch.int32, device=device)
            self._divide(list(parts.values()), orders)
        found, self._stored = _targets(self._form, self._layout.num_inputs, parts, staging)
        return found

    def settle(self) -> None:
        for (weight, order), (layer, tensors) in zip(self._parts, self._stored.items(), strict=True):
            read = read_matrix(self._form, layer, tensors, self._layout.num_inputs)
            assert read.order is not None
            weight.fill(numbers_of(read, self._layout))
            order.copy_(read.order)
        self._stored = {}

    def padded(self, num_rows: int) -> int:
        return num_rows

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.cat([weight.product(x.index_select(1, order)) for weight, order in self._parts], dim=1)
        return out if bias is None else out + bias


def _staging_bytes(num_outputs: int, num_inputs: int, form: StoredForm) -> int:
    """Of so many outputs, however they are divided among so many matrices."""

    def of_matrix(outputs: int) -> int:
        shapes = form.shapes("", outputs, num_inputs).values()
        return sum(4 * math.prod(shape) + ALIGNMENT for shape in shapes)

    return of_matrix(num_outputs) + (_MAX_PARTS - 1) * of_matrix(8)  # as few as a word has


def _targets(form: StoredForm, num_inputs: int, parts: Parts, staging: Tensor) -> tuple[dict[str, Tensor], Stored]:
    """The tensors by their names, and again by their layer and what they are of it."""
    found, stored, begin = {}, Stored(), 0
    for layer, num_outputs in parts.items():
        stored[layer] = {}
        for name, shape in form.shapes(layer, num_outputs, num_inputs).items():
            dtype = torch.int32 if name.endswith((*INTEGERS, *SIZES)) else torch.float32
            tensor = _part(staging, begin, shape, dtype)
            begin = -(-(begin + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
            found[name] = stored[layer][name.rpartition(".")[2]] = tensor
    return found, stored


def numbers_of(read: StoredMatrix, layout: RowLayout) -> Numbers:
    """As the rows of `layout` have them."""
    if not layout.group_size:
        return Numbers(read.numbers, read.scales.squeeze(1))
    num_groups = -(-layout.num_inputs // layout.group_size)
    scales, zeros = read.scales.contiguous(), read.zeros
    if scales.shape[1] == 1 < num_groups:  # one for all inputs
        scales = scales.expand(-1, num_groups)
        zeros = None if zeros is None else zeros.expand(-1, num_groups)
    factors = _factors(scales)
    return Numbers(read.numbers, factors, (scales / factors.unsqueeze(1)).half(), zeros)


def _part(staging: Tensor, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return staging[begin : begin + num_bytes].view(dtype).view(shape)


def _factors(scales: Tensor) -> Tensor:
    """Powers of two, one a row of [N, G]: 1 where float16 has the scales as they are."""
    largest = scales.abs().amax(dim=1)
    fitting = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp_min(-100))
    return torch.where((scales.half().float() == scales).all(dim=1), 1.0, fitting)


def quantized_weight(
    num_outputs: int, num_inputs: int, *, quantization: Quantization, dtype: torch.dtype, device: torch.device = CPU
) -> QuantizedWeight:
    """dtype: of the checkpoint's matrix, where that is a plain one. Not of one that `is_ordered`."""
    layout = quantization.layout(num_inputs)
    return _weight_in(new_rows(num_outputs, layout, device), layout, quantization, dtype)


def ordered_weight(
    num_outputs: int, num_inputs: int, *, quantization: Quantization, device: torch.device = CPU
) -> OrderedWeight:
    assert quantization.form is not None
    layout = quantization.layout(num_inputs)
    return OrderedWeight(new_rows(num_outputs, layout, device), layout, quantization.form)


def weight_of(
    num_outputs: int, num_inputs: int, *, quantization: Quantization, dtype: torch.dtype, device: torch.device = CPU
) -> Weight:
    """One of the two."""
    if quantization.is_ordered:
        return ordered_weight(num_outputs, num_inputs, quantization=quantization, device=device)
    return quantized_weight(num_outputs, num_inputs, quantization=quantization, dtype=dtype, device=device)


def weight_in(
    matrix: Tensor, layout: RowLayout, orders: Tensor | None, *, quantization: Quantization, dtype: torch.dtype
) -> Weight:
    """A weight whose memory is a part of a larger one's. matrix: [N, row_bytes] uint8.  orders: as of OrderedWeight.

    dtype: as of `quantized_weight`.
    """
    if orders is not None:
        assert quantization.form is not None
        return OrderedWeight(matrix, layout, quantization.form, orders)
    return _weight_in(matrix, layout, quantization, dtype)


def _weight_in(matrix: Tensor, layout: RowLayout, quantization: Quantization, dtype: torch.dtype) -> QuantizedWeight:
    if quantization.form is not None:
        return StoredWeight(matrix, layout, quantization.form)
    return (Nf4Weight if layout.is_nf4 else QuantizedWeight)(matrix, layout, dtype)


def quantization_on(name: str, device: torch.device, stored: Quantization | None = None) -> Quantization | None:
    """As `quantization_of`. Raises SetupError for a GPU without Triton, whose kernels multiply there."""
    found = quantization_of(name, stored)
    if found is not None and device.type == "cuda" and not gpu.available():
        raise SetupError(
            f"weights in {found.num_bits} bits need Triton on a GPU, and it is not installed: pip install triton, or "
            "set device to cpu"
        )
    return found
