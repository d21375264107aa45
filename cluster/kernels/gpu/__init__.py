"""Kernels for GPUs, written in Triton. Imported only where Triton is: `available` says so without importing it."""

import importlib.util


def available() -> bool:
    """Whether Triton is installed; torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None
