"""The values that the runtime's actors exchange, and the names they find one another by. Starts nothing."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from cluster.config import ClusterConfig
from cluster.evolving import evolving
from cluster.experts.placement import PlacementPlan
from cluster.types import EngineStats
from cluster.version import __version__

RAY_FOLDER = "r"  # of a Ray of ours: it opens its folder to everybody, and the one above is closed
NAMESPACE = "moe-cluster"  # of all named actors, so that `ray list actors` shows them together
LONG_POLL_S = 10.0  # how long a question for news waits at the controller
REPLICA_SILENCE_S = 2.5 * LONG_POLL_S  # an engine asks for the plan once a long poll; a dead one no more
LEASE_S = 60.0  # a controller that nobody has asked for so long takes its shards down; longer than a Serve redeploy

ShardState = Literal["waiting for resources", "loading", "up", "lost"]


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A plan and the actor of each shard that is up. A shard that is being replaced has none."""

    plan: PlacementPlan
    handles: Mapping[int, Any]


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessInfo:
    """Where a process runs: its node's Ray id, and the ids of the GPUs that Ray gave it; and this package's version.

    slot: an engine's place among those that live; its metrics are named by it, and its successor's go on there. -1 for
        none.
    """

    pid: int
    node_id: str
    gpu_ids: tuple[int, ...]
    version: str = ""
    slot: int = -1


def process_info() -> ProcessInfo:
    """This process, which Ray runs."""
    context = ray.get_runtime_context()
    return ProcessInfo(
        pid=os.getpid(),
        node_id=context.get_node_id(),
        gpu_ids=tuple(ray.get_gpu_ids()),
        version=__version__,
    )


@evolving("cluster.runtime.protocol")
@dataclass(slots=True, kw_only=True)
class ShardStatus:
    """One shard as the controller sees it. loaded_bytes of total_bytes are read while it loads. actor: its name."""

    shard_id: int
    actor: str = ""
    state: ShardState = "waiting for resources"
    loaded_bytes: int = 0
    total_bytes: int = 0
    respawns: int = 0
    process: ProcessInfo | None = None

    @property
    def node_id(self) -> str:
        return "" if self.process is None else self.process.node_id


@evolving("cluster.runtime.protocol")
@dataclass(slots=True, kw_only=True)
class ReplicaStatus:
    """One attention replica's engine as the controller sees it.

    engine: its actor; None for one that is not.  asked_at: when it last asked for the plan.  epoch: of the plan it has.
    """

    name: str
    process: ProcessInfo
    engine: Any | None
    asked_at: float
    epoch: int = 0
    stats: EngineStats | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that went wrong and was dealt with. at: seconds of the wall clock."""

    at: float
    what: str


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """What a controller leaves with the shards for its successor. version: grows with every change."""

    version: float
    plan: PlacementPlan
    target: int
    config: ClusterConfig


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The controller's view.

    replicas: the engines that have asked for the plan lately.  uncovered_s: for how long some expert has had no copy
    that is up, 0 if none.  target_shards: as many as were asked for.  work: the change under way, "" for none.
    load: [sparse layers][experts] tokens/s, lately.  imbalance: the slowest shard's share of the load against the mean.
    process: the controller's.
    """

    epoch: int
    shards: tuple[ShardStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    metrics_addresses: tuple[str, ...]
    draining: bool
    failure: str = ""
    plan: PlacementPlan | None = None
    published: bool = False
    uncovered_s: float = 0.0
    target_shards: int = 0
    work: str = ""
    load: list[list[float]] | None = None
    imbalance: float = 1.0
    faults: tuple[Fault, ...] = ()
    config: ClusterConfig | None = None
    process: ProcessInfo | None = None

    def serves(self, patience_s: float) -> bool:
        """Whether requests are answered: no expert has been without a copy for longer than they wait for one."""
        return self.published and self.uncovered_s <= patience_s

    @property
    def versions(self) -> tuple[str, ...]:
        """Of this package, in controller, shards and engines: more than one during a rollout."""
        processes = [self.process, *(s.process for s in self.shards), *(r.process for r in self.replicas)]
        return tuple(sorted({process.version for process in processes if process is not None}))

    @property
    def covered(self) -> bool:
        """Whether every expert has a copy that is up."""
        return self.published and not self.uncovered_s


def shard_group(config: ClusterConfig) -> str:
    """A name for the shards of a configuration: what would load or place them otherwise names them otherwise.

    A redeployed application with the same experts finds the running shards, whatever their number; one with others
    makes new ones beside.
    """
    fields = (
        config.model, config.dtype, config.device, config.gpus_per_expert_shard, config.cpus_per_expert_shard,
        config.metrics_port,
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8]
    return f"moe-{digest}"


def metrics_dir(group: str) -> Path:
    """Where the processes of a node leave their metrics for its collector. For a connected process.

    Another Ray cluster on the machine counts for itself, with the same configuration too.
    """
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    if session.parent.name == RAY_FOLDER:
        return session.parents[1] / f"{group}-metrics"
    # Not in it: Ray opens it to everybody.
    return Path(tempfile.gettempdir()) / f"{group}-{hashlib.sha256(session.name.encode()).hexdigest()[:8]}-metrics"
