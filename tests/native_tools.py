"""For tests of the native kernels: every variant that this machine can run, and memory with guards."""

from collections.abc import Callable

import pytest
import torch

from cluster.kernels.native.library import variants

GUARD = 64  # bytes on either side


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
