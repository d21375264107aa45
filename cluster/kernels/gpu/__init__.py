"""Kernels for GPUs, written in Triton. Whoever imports one of these modules needs Triton; this one does not."""

import importlib.util
from functools import cache

from torch import Tensor


@cache
def available() -> bool:
    """Whether Triton is installed; torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None


def runs_on(x: Tensor) -> bool:
    """Whether these kernels take x."""
    return x.is_cuda and available()
