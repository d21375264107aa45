"""For tests of the native kernels: every variant that this machine can run, and memory with guards."""

from collections.abc import Callable

import pytest
import torch

from cluster.kernels.native.library import DTYPES, Native, variants

GUARD = 64  # bytes on either side
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


# The test's argument `native` is each variant in turn; the test's name says which. Skipped without a library.
each_variant = pytest.mark.parametrize(
    "native",
    [pytest.param(native, id=name) for name, native in variants().items()]
    or [pytest.param(None, marks=pytest.mark.skip(reason="the native kernels are not built"))],
)


def bounded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], None]]:
    """Returns a tensor of ones bits, and a check that nothing beside it was written."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.full((GUARD + num_bytes + GUARD,), 0xFF, dtype=torch.uint8)

    def check() -> None:
        assert (memory[:GUARD] == 0xFF).all(), "written before the memory"
        assert (memory[GUARD + num_bytes :] == 0xFF).all(), "written past the memory"

    return memory[GUARD : GUARD + num_bytes].view(dtype).view(shape), check


def linear(
    native: Native, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, form: int, threads: int
) -> torch.Tensor:
    """`linear_quantized` into memory with guards, from rows that end where their memory ends."""
    (m, k), n = x.shape, packed.shape[0]
    rows, check_rows = bounded(tuple(packed.shape), torch.uint8)
    rows.copy_(packed)
    out, check = bounded((m, n), x.dtype)
    scratch, check_scratch = bounded((native.quantized_scratch(DTYPES[x.dtype], form, m, k),), torch.uint8)
    native.linear_quantized(
        DTYPES[x.dtype], form, x.data_ptr(), x.stride(0), rows.data_ptr(), rows.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), n, m, n, k, scratch.data_ptr(), threads,
    )  # fmt: skip
    check()
    check_scratch()
    check_rows()
    return out


def assert_close(
    found: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, sizes: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """sizes: [N, K], at least each weight's magnitude, and that of a number and a zero which almost cancel."""
    exact = x.double() @ matrix.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ sizes.T + 1
    bound = ROUNDING[x.dtype] * exact.abs() + (x.shape[1] + 8) * 2**-23 * size
    assert ((found.double() - exact).abs() <= bound).all()
