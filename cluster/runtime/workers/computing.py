"""The first steps of a process that computes. Torch loads with it, which others do without: 1.1 s and 170 MB each."""

import logging
import warnings

import ray
import torch

from cluster.config.resources import available_cpus
from cluster.kernels.native.report import log_kernels

log = logging.getLogger(__name__)


def prepare_to_compute(num_threads: int) -> None:
    """Gives torch its threads, and logs which kernels there are. After `prepare_process`."""
    log_kernels()
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # rows are only read
    torch.set_num_threads(min(num_threads, available_cpus()))
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        log.warning("Ray gave this process GPUs %s, but its torch has no CUDA", ray.get_gpu_ids())
