"""What the actors' processes are started with."""

from typing import Any

from cluster.config.environment import MALLOC_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.runtime.protocol import metrics_dir

SHARE = 0.001  # of a custom resource, for one process: a node may have any number of them


def num_threads(num_cpus: float) -> int:
    """Threads that a process computes with on the CPU: as many as the CPUs that it was given, at least one."""
    return max(1, int(num_cpus))


def share_of(resource: str) -> dict[str, float]:
    """What a process asks of a node's custom resource, so that it runs where there is some. ""  is none."""
    return {resource: SHARE} if resource else {}


def actor_environment(group: str, threads: int) -> dict[str, Any]:
    """Ray's runtime_env for an actor: where its metrics go, and threads that do not spin while they wait."""
    return {
        "env_vars": {
            "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir(group)),
            "OMP_NUM_THREADS": str(threads),
            **SHARED_CORES_ENVIRONMENT,
            **MALLOC_ENVIRONMENT,
        }
    }
