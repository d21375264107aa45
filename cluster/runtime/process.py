"""What the actors' processes are started with."""

import os
from typing import Any

from cluster.config.environment import DIRECT_ENVIRONMENT, MALLOC_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.logs import LOG_FORMAT
from cluster.runtime.protocol import metrics_dir

SHARE = 0.001  # of a custom resource, for one process: a node may have any number of them


def num_threads(num_cpus: float) -> int:
    """Threads that a process computes with on the CPU: as many as the CPUs that it was given, at least one."""
    return max(1, int(num_cpus))


def share_of(resource: str) -> dict[str, float]:
    """What a process asks of a node's custom resource, so that it runs where there is some. ""  is none."""
    return {resource: SHARE} if resource else {}


def actor_environment(group: str, threads: int, log_format: str = "") -> dict[str, Any]:
    """Ray's runtime_env for an actor: where its metrics go, and threads that do not spin while they wait.

    log_format: of its log lines; "" is that of this process.
    """
    log_format = log_format or os.environ.get(LOG_FORMAT, "")
    return {
        "env_vars": {
            "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir(group)),
            "OMP_NUM_THREADS": str(threads),
            **DIRECT_ENVIRONMENT,
            **SHARED_CORES_ENVIRONMENT,
            **MALLOC_ENVIRONMENT,
            **({LOG_FORMAT: log_format} if log_format else {}),
        }
    }
