"""Triton's kernels for the tests: compiled where there is a GPU, elsewhere in Triton's interpreter (conftest.py)."""

import importlib

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bfloat16 by its bits.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


def gpu_kernels(name):
    """A module of `cluster.kernels.gpu`. Skips the caller's module where Triton is not installed."""
    pytest.importorskip("triton")
    return importlib.import_module(f"cluster.kernels.gpu.{name}")
