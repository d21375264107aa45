"""Faults of a running cluster. Each one says in a few words what it did, and which process it ended."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.runtime.operate import Part, RunningCluster
from cluster.runtime.workers.rehearsal import Disturbance
from cluster.status import ProcessInfo

_STOPPED_S = (0.5, 3.0)
_SLOW_S = 3.0
_WHOLE_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that has been. killed: the process that it ended, None for none.  fronts: those that there were, where it
    was one of them."""

    what: str
    killed: ProcessInfo | None = None
    fronts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A fault and its end. at: when, on the monotonic clock.  recovered_s: from then until the cluster was whole."""

    kind: str
    what: str
    at: float
    recovered_s: float


Fault = Callable[[RunningCluster, random.Random], Injected]


def kill_shard(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "shard", signal.SIGKILL)


def kill_replica(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "replica", signal.SIGKILL)


def kill_rank(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "rank", signal.SIGKILL)


def kill_controller(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "controller", signal.SIGKILL)


def kill_ingress(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _kill_front(cluster, rng, "ingress")


def kill_haproxy(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _kill_front(cluster, rng, "haproxy")


def end_shard(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "shard", signal.SIGTERM)


def end_replica(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _end(cluster, rng, "replica", signal.SIGTERM)


def stop_shard(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _stop(cluster, rng, "shard")


def stop_replica(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _stop(cluster, rng, "replica")


def cut_streams(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _disturb(cluster, rng, "cut", 0.0)


def damage_frame(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _disturb(cluster, rng, "damage", 0.0)


def slow_shard(cluster: RunningCluster, rng: random.Random) -> Injected:
    return _disturb(cluster, rng, "slow", _SLOW_S)


def refuse_memory(cluster: RunningCluster, rng: random.Random) -> Injected:
    """The next experts that one shard shall load find no memory: the move fails, the old plan stays."""
    refused = _disturb(cluster, rng, "no memory", 0.0)
    try:
        outcome = cluster.shuffle(rng.randrange(4, 16), rng.randrange(1 << 30))
    except ClusterError as error:
        outcome = str(error)
    return Injected(f"{refused.what}; {outcome}")


def move_experts(cluster: RunningCluster, rng: random.Random) -> Injected:
    return Injected(cluster.shuffle(rng.randrange(4, 16), rng.randrange(1 << 30)))


def rebalance(cluster: RunningCluster, rng: random.Random) -> Injected:
    return Injected(cluster.rebalance())


def scale_experts(cluster: RunningCluster, rng: random.Random) -> Injected:
    """One shard more, or back to as many as before."""
    now, first = len(cluster.status().shards), cluster.first_shards
    return Injected(cluster.scale_experts(now + 1 if now <= first else first))


KINDS: dict[str, Fault] = {
    "kill-shard": kill_shard,
    "kill-replica": kill_replica,
    "kill-rank": kill_rank,
    "kill-controller": kill_controller,
    "kill-ingress": kill_ingress,
    "kill-haproxy": kill_haproxy,
    "end-shard": end_shard,
    "end-replica": end_replica,
    "stop-shard": stop_shard,
    "stop-replica": stop_replica,
    "cut-streams": cut_streams,
    "damage-frame": damage_frame,
    "slow-shard": slow_shard,
    "refuse-memory": refuse_memory,
    "move-experts": move_experts,
    "rebalance": rebalance,
    "scale-experts": scale_experts,
}


def inject(kind: str, cluster: RunningCluster, rng: random.Random, num_replicas: int, timeout_s: float) -> Recovery:
    """One fault, on a whole cluster, and then until it is whole again. Raises ClusterError when it does not recover."""
    at = time.monotonic()
    fault = KINDS[kind](cluster, rng)
    done = time.monotonic()
    wait_whole(cluster, num_replicas, timeout_s, killed=fault.killed)
    if fault.fronts and fault.killed is not None:
        wait_fronts(cluster, fault.fronts, fault.killed, timeout_s, done)
    return Recovery(kind=kind, what=fault.what, at=at, recovered_s=time.monotonic() - done)


def wait_whole(cluster: RunningCluster, num_replicas: int, timeout_s: float, killed: ProcessInfo | None = None) -> None:
    """Until all shards and attention replicas are up again, and the killed process is missed. Raises ClusterError."""
    deadline = time.monotonic() + timeout_s
    missing = "the controller"
    while time.monotonic() < deadline:
        try:
            status = cluster.status()
            processes = {part.process for part in cluster.parts()}
        except ClusterError:
            time.sleep(_WHOLE_POLL_S)
            continue
        up = sum(replica.stats is not None for replica in status.replicas)
        shards_up = status.published and all(shard.state == "up" for shard in status.shards)
        if (
            killed not in processes
            and shards_up
            and up >= num_replicas
            and not status.work
            and len(status.shards) == status.target_shards
        ):
            return
        missing = f"{up} of {num_replicas} attention replicas, shards {[shard.state for shard in status.shards]}"
        time.sleep(_WHOLE_POLL_S)
    raise ClusterError(f"the cluster was not whole again after {timeout_s:g} s: {missing}")


def wait_fronts(
    cluster: RunningCluster, before: Sequence[Part], killed: ProcessInfo, timeout_s: float, since: float
) -> None:
    """Until as many ingresses serve as before, and each node has its HAProxy again. Raises ClusterError.

    since: when its time began, on the monotonic clock.
    """
    num_ingresses, nodes = _shape(before)
    while True:
        try:
            now, num_serving = cluster.fronts(), cluster.ready_ingresses()
        except ClusterError as error:
            missing = str(error)
        else:
            num_now, nodes_now = _shape(now)
            num_ready = min(num_now, num_serving)
            if killed not in {part.process for part in now} and num_ready >= num_ingresses and nodes_now >= nodes:
                return
            missing = f"{num_ready} of {num_ingresses} ingresses, HAProxy on {len(nodes_now)} of {len(nodes)} nodes"
        if time.monotonic() > since + timeout_s:
            raise ClusterError(f"the front was not whole again after {timeout_s:g} s: {missing}")
        time.sleep(_WHOLE_POLL_S)


def _shape(fronts: Sequence[Part]) -> tuple[int, set[str]]:
    """The number of ingresses, and the nodes with a HAProxy: one has several while it is renewed."""
    return (
        sum(part.role == "ingress" for part in fronts),
        {part.process.node_id for part in fronts if part.role == "haproxy"},
    )


def _pick(parts: Sequence[Part], rng: random.Random, role: str) -> Part:
    found = [part for part in parts if part.role == role]
    if not found:
        raise ClusterError(f"there is no {role} to be disturbed")
    return rng.choice(found)


def _kill_front(cluster: RunningCluster, rng: random.Random, role: str) -> Injected:
    before = tuple(cluster.fronts())
    part = _pick(before, rng, role)
    cluster.send_signal(part.process, signal.SIGKILL)
    return Injected(f"SIGKILL to {part.name} ({part.process.pid})", killed=part.process, fronts=before)


def _end(cluster: RunningCluster, rng: random.Random, role: str, number: signal.Signals) -> Injected:
    part = _pick(cluster.parts(), rng, role)
    cluster.send_signal(part.process, number)
    return Injected(f"{number.name} to {part.name} ({part.process.pid})", killed=part.process)


def _stop(cluster: RunningCluster, rng: random.Random, role: str) -> Injected:
    part, seconds = _pick(cluster.parts(), rng, role), rng.uniform(*_STOPPED_S)
    cluster.send_signal(part.process, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        cluster.send_signal(part.process, signal.SIGCONT)
    return Injected(f"{part.name} ({part.process.pid}) stopped for {seconds:.1f} s")


def _disturb(cluster: RunningCluster, rng: random.Random, what: Disturbance, seconds: float) -> Injected:
    shard_id = rng.choice([shard.shard_id for shard in cluster.status().shards])
    cluster.disturb(shard_id, what, seconds)
    return Injected(f"{what} at shard {shard_id}")
