"""A cluster's parts as a watcher sees them: plain values that become JSON. Computes no rates."""

from dataclasses import dataclass
from typing import Literal

from cluster.experts.placement import PlacementPlan
from cluster.serving.live.events import Event
from cluster.serving.live.public import public
from cluster.status import ClusterStatus, ProcessInfo, ReplicaStatus, ShardStatus

State = Literal["starting", "serving", "uncovered", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPicture:
    """node: counted from 1, in the order of their first sight in the status."""

    pid: int
    node: int
    gpus: tuple[int, ...]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPicture:
    """num_experts: that the plan gives it, over all layers.  loaded_bytes of total_bytes: while it loads."""

    id: int
    state: str
    num_experts: int
    loaded_bytes: int
    total_bytes: int
    respawns: int
    process: ProcessPicture | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPicture:
    """epoch: of the plan that it has.  loaded_bytes of total_bytes: while it loads."""

    name: str
    slot: int
    epoch: int
    ready: bool
    loaded_bytes: int
    total_bytes: int
    process: ProcessPicture


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPicture:
    """work: the change under way, and nodes that leave, "" for none.  target_shards: as many as were asked for.
    num_copied: experts, over all layers, with more than one copy.  adapters: names of the LoRA adapters.
    """

    state: State
    reason: str
    model: str
    epoch: int
    work: str
    target_shards: int
    num_layers: int
    num_experts: int
    num_copied: int
    versions: tuple[str, ...]
    shards: tuple[ShardPicture, ...]
    replicas: tuple[ReplicaPicture, ...]
    adapters: tuple[str, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPicture:
    """owners: for each sparse layer and each expert the shards that hold a copy."""

    epoch: int
    layer_ids: tuple[int, ...]
    num_experts: int
    owners: tuple[tuple[tuple[int, ...], ...], ...]


def cluster_picture(status: ClusterStatus, model: str, events: tuple[Event, ...]) -> ClusterPicture:
    """model: the name that clients see."""
    nodes = _nodes(status)
    plan = status.plan
    return ClusterPicture(
        state=_state(status),
        reason=public(status.failure),
        model=model,
        epoch=status.epoch,
        work=public("; ".join(filter(None, [status.work, *_leaving(status, nodes)]))),
        target_shards=status.target_shards,
        num_layers=0 if plan is None else len(plan.layer_ids),
        num_experts=0 if plan is None else plan.num_experts,
        num_copied=0 if plan is None else num_copied(plan),
        versions=status.versions,
        shards=tuple(_shard(shard, plan, nodes) for shard in status.shards),
        replicas=tuple(_replica(replica, nodes) for replica in status.replicas if replica.engine is not None),
        adapters=status.adapters,
        events=events,
    )


def placement_picture(plan: PlacementPlan) -> PlacementPicture:
    return PlacementPicture(
        epoch=plan.epoch,
        layer_ids=plan.layer_ids,
        num_experts=plan.num_experts,
        owners=tuple(tuple(plan.owners(layer_id)) for layer_id in plan.layer_ids),
    )


def num_copied(plan: PlacementPlan) -> int:
    """Experts, over all layers, with more than one copy."""
    return sum(len(owners) > 1 for layer_id in plan.layer_ids for owners in plan.owners(layer_id))


def _leaving(status: ClusterStatus, nodes: dict[str, int]) -> list[str]:
    """A text for each node that Ray drains."""
    return [
        f"Ray drains node {nodes.get(node.node_id, 'without processes')}{node.waits and f': {node.waits}'}"
        for node in status.leaving_nodes
    ]


def _state(status: ClusterStatus) -> State:
    if status.failure:
        return "failed"
    if status.draining:
        return "draining"
    if not status.published:
        return "starting"
    return "serving" if status.covered else "uncovered"


def _nodes(status: ClusterStatus) -> dict[str, int]:
    processes = [status.process, *(s.process for s in status.shards), *(r.process for r in status.replicas)]
    ids = dict.fromkeys(process.node_id for process in processes if process is not None)
    return {node_id: number for number, node_id in enumerate(ids, 1)}


def _process(process: ProcessInfo, nodes: dict[str, int]) -> ProcessPicture:
    return ProcessPicture(pid=process.pid, node=nodes[process.node_id], gpus=process.gpu_ids, version=process.version)


def _shard(shard: ShardStatus, plan: PlacementPlan | None, nodes: dict[str, int]) -> ShardPicture:
    held = plan.slices[shard.shard_id] if plan is not None and shard.shard_id < plan.num_shards else {}
    loading = shard.state == "loading"
    return ShardPicture(
        id=shard.shard_id,
        state=shard.state,
        num_experts=sum(map(len, held.values())),
        loaded_bytes=shard.loaded_bytes if loading else 0,
        total_bytes=shard.total_bytes if loading else 0,
        respawns=shard.respawns,
        process=None if shard.process is None else _process(shard.process, nodes),
    )


def _replica(replica: ReplicaStatus, nodes: dict[str, int]) -> ReplicaPicture:
    ready = replica.stats is not None
    return ReplicaPicture(
        name=replica.name,
        slot=replica.process.slot,
        epoch=replica.epoch,
        ready=ready,
        loaded_bytes=0 if ready else replica.loaded_bytes,
        total_bytes=0 if ready else replica.total_bytes,
        process=_process(replica.process, nodes),
    )
