"""Prepares the caller's process to compute, for an `LLM`. Knows no model."""

import os

import torch

from cluster.config.environment import PRODUCTS_ENVIRONMENT
from cluster.config.resources import available_cpus
from cluster.kernels.native.report import log_kernels


def compute_here() -> None:
    """Gives torch its threads, and logs which kernels there are."""
    for name, value in PRODUCTS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read at the first product
    # torch counts the machine's cores, and knows nothing of a control group's quota.
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    log_kernels()
