"""Weight matrices in the forms in which products read them, and how they are filled. Knows neither layers nor files.

A caller multiplies with a weight and does not ask for its form. On the CPU a weight in 16 bits is read as it is by the
native kernels, or, where they are not built, packed once for oneDNN: at 24 GB/s for 1 row and 10 GB/s for 32, where
torch reads a plain one at 15 and 7.6 (2816 x 2048, 40 of them in turn, 2 threads of a Zen 4; BENCHMARKS.md). float32
stays with torch: it is the dtype in which answers are compared.
M: rows, N: outputs, K: inputs, H: hidden size, I: intermediate size.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels import gpu, large_pages, native_products
from cluster.kernels.native.library import TILE_INPUTS, TILES, Native, native
from cluster.kernels.native_products import ExpertPointers

# Where oneDNN has products in bfloat16: it took 1.0 of the native kernel's time at 64 rows, 0.9 at 96, 0.8 at 2048
# (2816 x 2048, 2 threads of a Zen 5). Elsewhere its products take ten times as long (`F.linear` with AVX2).
TORCH_ROWS = 64
EVERY_ROW = (
    1 << 40
)  # more rows than there are; times a layer's experts it fits in the 64 bits that the native loops have

# oneDNN compiles a product for each number of rows: 0.5 ms and 0.5 MB for every new one (512 x 256 and 2816 x 2048, one
# thread of a Zen 5). Experts get another number of rows in each step; rounded up to ROW_SIZES an octave they are few.
ROW_SIZES = 32

# Rows of which the CPU makes a SwiGLU at once: 2048 of an inner size of 5632 would take 92 MB beside their result.
SWIGLU_ROWS = 512

Parts = Mapping[str, int]  # matrices one above another: each one's name in the checkpoint without `.weight`, its rows


class Weight(Protocol):
    """One matrix [N, K]. It is made empty and filled by a `WeightLoader`."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes when it is filled."""

    def padded(self, num_rows: int) -> int:
        """Rows, so many or more, with which a product of num_rows is done soonest."""

    @property
    def staging_bytes(self) -> int:
        """Bytes of the CPU's memory that it is read into first; 0 where it is read straight into its place."""

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        """Returns the destination of each tensor that it needs of the checkpoint, by name.

        staging: [staging_bytes or more] uint8 on the CPU, used by no other weight until `settle`.
        """

    def settle(self) -> None:
        """Takes its form, now that its targets are filled."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As F.linear. x: [M, K]; bias: [N]. Returns [M, N]."""

    def swiglu(self, x: Tensor, down: Self) -> Tensor:
        """With this as gate above up [2I, H], and down [H, I]: silu(x · gate) * (x · up), times down. x: [M, H]."""


MakeWeight = Callable[[int, int], Weight]  # from N and K


class TwoProducts(Protocol):
    """A form without a SwiGLU of its own."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def swiglu(self, x: Tensor, down: Self) -> Tensor:
        """As `Weight.swiglu`."""
        if gpu.runs_on(x):
            from cluster.kernels.gpu.experts import silu_mul

            return down.product(silu_mul(self.product(x)))
        pieces = torch.split(x, SWIGLU_ROWS) if x.is_cpu else (x,)
        return torch.cat([self._swiglu(piece, down) for piece in pieces])

    def _swiglu(self, x: Tensor, down: Self) -> Tensor:
        gate, up = self.product(x).chunk(2, dim=-1)  # [M, I]
        return down.product(F.silu(gate).mul_(up))


class PlainWeight(TwoProducts):
    """A tensor as it is. matrix: [N, K], which may be a part of a larger one."""

    staging_bytes = 0

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        return split_rows(self._matrix, parts)

    def settle(self) -> None:
        """It has its form."""

    def padded(self, num_rows: int) -> int:
        return num_rows

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self._matrix, bias)


class NativeWeight(PlainWeight):
    """A matrix on the CPU, which the native kernels read as it is.

    torch_rows: from so many rows on torch's product is faster. None are so many where the kernels multiply in tiles:
        they took 0.6 to 1.0 of oneDNN's time from 64 rows to 2048, 0.7 in a SwiGLU, 0.5 to 0.7 of experts (2 cores of
        a Xeon with AMX).
    """

    form = 0

    def __init__(self, matrix: Tensor, native: Native) -> None:
        super().__init__(matrix)
        self.matrix = matrix
        self.num_inputs = matrix.shape[1]
        in_tiles = native.variant == TILES and self.num_inputs % TILE_INPUTS == 0
        self.torch_rows = EVERY_ROW if in_tiles or not packs(matrix.dtype, matrix.device) else TORCH_ROWS
        self._native = native

    @classmethod
    def empty(cls, num_outputs: int, num_inputs: int, *, dtype: torch.dtype, native: Native) -> Self:
        return cls(large_pages.empty(num_outputs, num_inputs, dtype=dtype), native)

    def padded(self, num_rows: int) -> int:
        return num_rows if num_rows < self.torch_rows else _rounded_up(num_rows)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[0] < self.torch_rows:
            return native_products.linear(self._native, x, self.matrix, bias)
        return super().product(x, bias)

    def swiglu(self, x: Tensor, down: Self) -> Tensor:
        if x.shape[0] >= min(self.torch_rows, down.torch_rows):
            return super().swiglu(x, down)
        pieces = torch.split(x, SWIGLU_ROWS) if len(x) > SWIGLU_ROWS else (x,)
        pointers = ExpertPointers([self.matrix], [down.matrix])
        products = [native_products.swiglu(self._native, piece, pointers) for piece in pieces]
        return torch.cat(products) if len(products) > 1 else products[0]


class PackedWeight(TwoProducts):
    """bfloat16 in oneDNN's layout, as large as a plain one."""

    # Fewer rows take longer: 0.65, 0.75 and 0.50 ms for 1, 2 and 3, 0.48 for 4 (2816 x 2048, 1 thread of a Zen 4).
    _MIN_ROWS = 4

    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        self._shape = (num_outputs, num_inputs)
        self.nbytes = self.staging_bytes = torch.bfloat16.itemsize * num_outputs * num_inputs
        self._matrix = torch.empty(0)  # plain in staging memory, then packed

    def targets(self, parts: Parts, staging: Tensor) -> dict[str, Tensor]:
        self._matrix = staging[: self.staging_bytes].view(torch.bfloat16).view(self._shape)
        return split_rows(self._matrix, parts)

    def settle(self) -> None:
        self._matrix = torch.ops.mkldnn._reorder_linear_weight(self._matrix)

    def padded(self, num_rows: int) -> int:
        return max(num_rows, self._MIN_ROWS) if num_rows < TORCH_ROWS else _rounded_up(num_rows)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        num_rows = x.shape[0]
        if num_rows < self._MIN_ROWS:
            x = torch.cat((x, x[:1].expand(self._MIN_ROWS - num_rows, -1)))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._matrix, bias, "none", [], "")
        return out[:num_rows]


def _rounded_up(num_rows: int) -> int:
    step = max(1, (1 << num_rows.bit_length() - 1) // ROW_SIZES)
    return -(-num_rows // step) * step


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype gain from being packed here."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def native_for(dtype: torch.dtype, device: torch.device) -> Native | None:
    """The native kernels, where they multiply weights of this dtype faster than torch."""
    return native() if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else None


def weight_maker(dtype: torch.dtype, device: torch.device) -> MakeWeight:
    """Chooses the form in which weights are multiplied fastest here."""
    kernels = native_for(dtype, device)
    if kernels is not None:
        return partial(NativeWeight.empty, dtype=dtype, native=kernels)
    return PackedWeight if packs(dtype, device) else partial(_plain, dtype=dtype, device=device)


class WeightLoader:
    """Fills weights from a checkpoint.

    Weights without staging memory are read together, in the order of the files. Those with it are read one by one into
    the same memory: freed between two of them, it would stay a hole in the heap.
    read: copies the checkpoint's tensors to their destinations, by name.
    """

    def __init__(self, read: Callable[[Mapping[str, Tensor]], object]) -> None:
        self._read = read
        self._staging = torch.empty(0, dtype=torch.uint8, device="cpu")

    def load(self, weights: Iterable[tuple[Weight, Parts]], plain_targets: Mapping[str, Tensor] | None = None) -> None:
        """Fills each weight with its parts. Blocks. plain_targets: tensors that are no weights, read with them."""
        wanted = list(weights)
        num_bytes = max((weight.staging_bytes for weight, _ in wanted), default=0)
        if num_bytes > len(self._staging):
            self._staging = self._staging.new_empty(num_bytes)
        together = dict(plain_targets or {})
        for weight, parts in wanted:
            targets = weight.targets(parts, self._staging)
            if weight.staging_bytes:
                self._read(targets)
                weight.settle()
            else:
                together |= targets
        if together:
            self._read(together)
        for weight, _ in wanted:
            if not weight.staging_bytes:
                weight.settle()


def _plain(num_outputs: int, num_inputs: int, *, dtype: torch.dtype, device: torch.device) -> PlainWeight:
    return PlainWeight(torch.empty(num_outputs, num_inputs, dtype=dtype, device=device))


def split_rows(matrix: Tensor, parts: Parts) -> dict[str, Tensor]:
    """The part of each matrix of the checkpoint, by the tensor's name."""
    rows = torch.split(matrix, list(parts.values()))
    return {f"{name}.weight": part for name, part in zip(parts, rows, strict=True)}
