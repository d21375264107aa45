"""The environment and the first steps of each actor's process."""

import hashlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.config.environment import DIRECT_ENVIRONMENT, MEMORY_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.logs import LOG_FORMAT
from cluster.runtime.names import RAY_FOLDER
from cluster.runtime.ray_logs import log_to_ray
from cluster.runtime.ray_private.core import session_folder
from cluster.status import ProcessInfo
from cluster.version import __version__

SHARE = 0.001  # of a custom resource, for one process: a node may have any number of them


def num_threads(num_cpus: float) -> int:
    """Threads with which a process computes: one for each of its CPUs, at least one."""
    return max(1, int(num_cpus))


def num_sharers(config: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Number of engines that may share the memory of a machine, or of a GPU.

    nodes: from `ray.nodes()`. Serve spreads replicas, so no node has more than its part, rounded up.
    """
    gpus = config.gpus_per_attention_replica or 0
    if gpus:
        return max(1, int(1 / gpus))
    resource = config.attention_resource or "CPU"
    hosts = sum(bool(node["Alive"] and node["Resources"].get(resource, 0)) for node in nodes)
    return -(-max(config.attention_replicas, config.max_attention_replicas or 0) // max(1, hosts))


def share_of(resource: str) -> dict[str, float]:
    """A process's share of a node's custom resource, so that it runs only where there is some. "": no resource."""
    return {resource: SHARE} if resource else {}


def actor_environment(group: str, threads: int, log_format: str = "") -> dict[str, Any]:
    """Ray's runtime_env for an actor: the folder of its metrics, and threads that do not spin while they wait.

    log_format: of its log lines; "" takes this process's.
    """
    log_format = log_format or os.environ.get(LOG_FORMAT, "")
    return {
        "env_vars": {
            "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir(group)),
            "OMP_NUM_THREADS": str(threads),
            **DIRECT_ENVIRONMENT,
            **SHARED_CORES_ENVIRONMENT,
            **MEMORY_ENVIRONMENT,
            **({LOG_FORMAT: log_format} if log_format else {}),
        }
    }


def shared_actor_options(group: str, resource: str) -> dict[str, Any]:
    """Ray's options for an actor of which a group has one, made by whichever process needs it first.

    It outlives its maker, and is not in its placement group, with which it would die.
    """
    return {
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": share_of(resource),
        "max_restarts": -1,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(None),
        "runtime_env": actor_environment(group, 1),
    }


def process_info(rank_pids: tuple[int, ...] = ()) -> ProcessInfo:
    """Describes this process, which Ray runs."""
    context = ray.get_runtime_context()
    return ProcessInfo(
        pid=os.getpid(),
        node_id=context.get_node_id(),
        gpu_ids=tuple(ray.get_gpu_ids()),
        version=__version__,
        takes_adapters=True,
        takes_aborts=True,
        takes_traces=True,
        rank_pids=rank_pids,
    )


def metrics_dir(group: str) -> Path:
    """The folder where a node's processes write metrics for its collector. Needs a connection to Ray.

    Each Ray cluster of a machine has another one, even with the same configuration.
    """
    session = session_folder()
    if session.parent.name == RAY_FOLDER:
        return session.parents[1] / f"{group}-metrics"
    # Not in the session's folder: Ray opens that to everybody.
    return Path(tempfile.gettempdir()) / f"{group}-{hashlib.sha256(session.name.encode()).hexdigest()[:8]}-metrics"


def prepare_process() -> None:
    """The first step of every actor's process: sends log lines to Ray's log files."""
    log_to_ray()


def end_at_sigterm() -> None:
    """Makes SIGTERM end the process at once. Call it in the main thread.

    Ray's own handler waits for the calls under way, but `hold` never ends: the process would hang, and its callers
    would only see silence. No process of ours needs time to end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
