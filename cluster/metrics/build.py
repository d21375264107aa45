"""The version of this package that a process runs."""

from typing import Literal

from prometheus_client import CollectorRegistry

from cluster.metrics.definitions import Definitions
from cluster.version import __version__

Role = Literal["ingress", "engine", "shard", "controller", "responses"]


def report_version(registry: CollectorRegistry, role: Role) -> CollectorRegistry:
    """Counts this process; returns the registry."""
    Definitions(registry).gauge(
        "moecluster_build_info",
        "Processes by role and version. Two versions for longer than a rollout takes: `moe-cluster roll` is still to "
        "come, or a process does not go.",
        "livesum",
        "role",
        "version",
    ).labels(role, __version__).set(1)
    return registry
