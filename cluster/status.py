"""A cluster at a moment, seen from outside: its processes, shards, attention replicas and faults.

Plain values that anyone may read. Knows no Ray; the controller makes them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cluster.config import ClusterConfig
from cluster.evolving import evolving
from cluster.experts.placement import PlacementPlan
from cluster.types import EngineStats

ShardState = Literal["waiting for resources", "loading", "up", "lost"]


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessInfo:
    """Where a process runs: its node's Ray id, and the ids of the GPUs that Ray gave it; and this package's version.

    slot: an engine's place among those that live; its metrics are named by it, and its successor's go on there. -1 for
        none.
    takes_adapters: whether it answers calls about LoRA adapters. (A handle does not tell: Ray gives it the methods of
        the caller's version, and an actor that lacks one ends.)
    takes_aborts: whether an engine answers `abort`.
    takes_traces: whether a shard takes the spans of a batch with it, in a Ray call.
    rank_pids: of the processes beside an engine's that share its model.
    """

    pid: int
    node_id: str
    gpu_ids: tuple[int, ...]
    version: str = ""
    slot: int = -1
    takes_adapters: bool = False
    takes_aborts: bool = False
    takes_traces: bool = False
    rank_pids: tuple[int, ...] = ()


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


class LeavingNode(NamedTuple):
    """A node that Ray drains. until: seconds of the wall clock, infinity where nobody has set it.  waits: why shards
    still stand on it, "" where they move. For who reads a status; none travels."""

    node_id: str
    until: float
    waits: str


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The controller's view.

    replicas: the engines that have asked for the plan lately.  uncovered_s: for how long some expert has had no copy
    that is up, 0 if none.  target_shards: as many as were asked for.  work: the change under way, "" for none.
    load: [sparse layers][experts] tokens/s, lately.  imbalance: the slowest shard's share of the load against the mean.
    process: the controller's.  lease_by_renewal: its `renew_lease` keeps the shards; older ones' `status` does.
    adapters: the names of those that all engines have.  adapters_version: grows with every change of them.
    leaving: the fields of each `LeavingNode`, plain: a process of a version without that class reads the rest.
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
    lease_by_renewal: bool = False
    adapters: tuple[str, ...] = ()
    adapters_version: float = -1.0
    leaving: tuple[tuple[str, float, str], ...] = ()

    def serves(self, patience_s: float) -> bool:
        """Whether requests are answered: no expert has been without a copy for longer than they wait for one."""
        return self.published and self.uncovered_s <= patience_s

    @property
    def leaving_nodes(self) -> tuple[LeavingNode, ...]:
        return tuple(LeavingNode(*node) for node in self.leaving)

    @property
    def dense(self) -> bool:
        """Whether the model has no routed experts, so that there are no shards."""
        return self.plan is not None and not self.plan.num_experts

    @property
    def versions(self) -> tuple[str, ...]:
        """Of this package, in controller, shards and engines: more than one during a rollout."""
        processes = [self.process, *(s.process for s in self.shards), *(r.process for r in self.replicas)]
        return tuple(sorted({process.version for process in processes if process is not None}))

    @property
    def shares(self) -> dict[int, float]:
        """Each shard's share of the load; an expert's copies share its load equally. Empty without load."""
        loads = dict.fromkeys((shard.shard_id for shard in self.shards), 0.0)
        if self.load is not None and self.plan is not None:
            for rates, layer_id in zip(self.load, self.plan.layer_ids, strict=True):
                for rate, owners in zip(rates, self.plan.owners(layer_id), strict=True):
                    for shard_id in owners:
                        loads[shard_id] = loads.get(shard_id, 0.0) + rate / len(owners)
        total = sum(loads.values())
        return {shard_id: load / total for shard_id, load in loads.items()} if total else {}

    @property
    def covered(self) -> bool:
        """Whether every expert has a copy that is up."""
        return self.published and not self.uncovered_s
