"""What the actors' processes are started with."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import ClusterConfig
from cluster.config.environment import DIRECT_ENVIRONMENT, MALLOC_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.logs import LOG_FORMAT
from cluster.runtime.protocol import metrics_dir

SHARE = 0.001  # of a custom resource, for one process: a node may have any number of them


def num_threads(num_cpus: float) -> int:
    """Threads that a process computes with on the CPU: as many as the CPUs that it was given, at least one."""
    return max(1, int(num_cpus))


def num_sharers(config: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Engines that may come to share one machine's memory, or one GPU's.

    nodes: as `ray.nodes()` says them. Serve spreads replicas, so no node has more than its part, rounded up.
    """
    gpus = config.gpus_per_attention_replica or 0
    if gpus:
        return max(1, int(1 / gpus))
    resource = config.attention_resource or "CPU"
    hosts = sum(bool(node["Alive"] and node["Resources"].get(resource, 0)) for node in nodes)
    return -(-max(config.attention_replicas, config.max_attention_replicas or 0) // max(1, hosts))


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
