"""Finds a served cluster on a Ray cluster, and inspects and changes it from outside while it serves."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError, SetupError, Unavailable
from cluster.runtime.front.processes import front_pids, ready_ingresses
from cluster.runtime.front.shared_responses import replace_store
from cluster.runtime.names import APPLICATION, ATTENTION_REPLICA, NAMESPACE, controller_name, group_of_controller
from cluster.runtime.ray_private.core import reports_to_log
from cluster.runtime.ray_private.serve import ask_for_replicas
from cluster.runtime.start.ray_address import CONNECT_HINT, find_ray
from cluster.runtime.workers.rehearsal import Disturbance
from cluster.status import ClusterStatus, ProcessInfo

log = logging.getLogger(__name__)

WAIT_INTERVAL_S = 0.2
STATUS_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 3600.0  # for experts to move: all shards read weights, one after another


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process of the cluster. role: "shard", "replica" (its engine), "rank" (beside that), "controller", and in front
    of them "ingress" and "haproxy"."""

    role: str
    name: str
    process: ProcessInfo


class RunningCluster:
    """A connection to a cluster. Close it; the cluster stays as it is."""

    def __init__(self, ray_address: str | None = None) -> None:
        """Raises SetupError when no Ray, or no served cluster, is found there."""
        self._connected = not ray.is_initialized()
        if self._connected:
            address = find_ray(ray_address)
            try:
                ray.init(
                    address=address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0].partition(" Please ")[0]
                raise SetupError(f"no running Ray cluster was found ({reason}): {CONNECT_HINT}") from None
            self._print_reports = reports_to_log()
        try:
            self.group = self._find_group()
            self.first_shards = self.status().target_shards  # when this object connected
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connected:
            ray.shutdown()
            self._print_reports()

    def status(self) -> ClusterStatus:
        return self._ask("status", STATUS_TIMEOUT_S)  # type: ignore[no-any-return]

    def rebalance(self) -> str:
        """Moves experts by the measured load; blocks; returns what was done. Raises ClusterError."""
        return self._ask("rebalance", CHANGE_TIMEOUT_S)  # type: ignore[no-any-return]

    def scale_experts(self, num_shards: int) -> str:
        """Adds or removes expert shards one at a time; blocks; returns what was done. Raises ClusterError."""
        return self._ask("scale", CHANGE_TIMEOUT_S, num_shards)  # type: ignore[no-any-return]

    def scale_attention(self, num_replicas: int) -> str:
        """Sets Serve's number of attention replicas; a replica that goes ends its requests first. Raises SetupError."""
        if num_replicas < 1:
            raise SetupError(f"{num_replicas} attention replicas: at least 1 is needed")
        try:
            ray.get(ask_for_replicas(ATTENTION_REPLICA, APPLICATION, num_replicas), timeout=STATUS_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise SetupError(f"Serve refuses it: {str(error.cause).splitlines()[0]}") from None
        return f"{num_replicas} attention replicas are asked for"

    def roll(self) -> str:
        """Gives the controller, the store of responses and each shard a new process, one after the other; blocks.
        Raises ClusterError."""
        before = self._ask("process", STATUS_TIMEOUT_S)
        ray.kill(ray.get_actor(controller_name(self.group), namespace=NAMESPACE), no_restart=False)
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while not self._has_successor(before):
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the controller was not back in {CHANGE_TIMEOUT_S:g} s after its end: see its log, and "
                    "`moe-cluster status`"
                )
            time.sleep(WAIT_INTERVAL_S)  # until Ray has restarted it
        status = self.status()
        done = "the controller has a new process" if status.dense else ""
        replaced = replace_store(status.config) if status.config is not None else ""
        if not status.dense:
            done = f"the controller and {self._ask('roll', CHANGE_TIMEOUT_S)}"
        return f"{done}; {replaced}" if replaced else done

    def _has_successor(self, controller: ProcessInfo) -> bool:
        """Whether another controller runs, and has found the shards."""
        try:
            return bool(self._ask("process", STATUS_TIMEOUT_S) != controller and self.status().published)
        except ClusterError:
            return False

    def shuffle(self, num_swaps: int, seed: int) -> str:
        """Swaps some experts at random, as a test of changes; blocks. Raises ClusterError."""
        return self._ask("shuffle", CHANGE_TIMEOUT_S, num_swaps, seed)  # type: ignore[no-any-return]

    def _shard_actor(self, shard_id: int) -> str:
        return next((s.actor for s in self.status().shards if s.shard_id == shard_id), f"no shard {shard_id}")

    def disturb(self, shard_id: int, what: Disturbance, seconds: float) -> None:
        """As `Rehearsal.begin`. A shard that is gone is no error."""
        try:
            shard = ray.get_actor(self._shard_actor(shard_id), namespace=NAMESPACE)
            ray.get(shard.disturb.remote(what, seconds), timeout=STATUS_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayError) as error:
            log.debug("shard %d is not there to be disturbed: %s", shard_id, error)

    def attention_replicas(self) -> int:
        """Number of attention replicas that Serve has running."""
        app = serve.status().applications.get(APPLICATION)
        return 0 if app is None else app.deployments[ATTENTION_REPLICA].replica_states.get("RUNNING", 0)

    def parts(self) -> list[Part]:
        """The processes that are up, and may fail one at a time."""
        status = self.status()
        found = [Part(role="controller", name="controller", process=self._ask("process", STATUS_TIMEOUT_S))]
        found += [
            Part(role="shard", name=f"shard {s.shard_id}", process=s.process)
            for s in status.shards
            if s.process is not None and s.state == "up"
        ]
        for replica in (r for r in status.replicas if r.engine):
            found.append(Part(role="replica", name=replica.name, process=replica.process))
            for rank, pid in enumerate(replica.process.rank_pids, 1):
                process = replace(replica.process, pid=pid, rank_pids=())
                found.append(Part(role="rank", name=f"rank {rank} of {replica.name}", process=process))
        return found

    def fronts(self) -> list[Part]:
        """The ingresses and HAProxies that run. Raises ClusterError."""
        known = {part.process.node_id: part.process.pid for part in self.parts()}
        with _in_one_line("the processes in front of the cluster cannot be listed"):
            found = front_pids(known)
        return [
            Part(role=role, name=role, process=ProcessInfo(pid=pid, node_id=node, gpu_ids=()))
            for role, node, pid in found
        ]

    def ready_ingresses(self) -> int:
        """Number of ingresses that Serve has running. Raises ClusterError."""
        with _in_one_line("Serve does not tell which ingresses run"):
            return ready_ingresses()

    def send_signal(self, process: ProcessInfo, number: signal.Signals) -> None:
        """Signals a process; on another node by a task there. A process that is gone is no error. Raises
        ClusterError."""
        if process.node_id == ray.get_runtime_context().get_node_id():
            _send_signal(process.pid, int(number))
            return
        where = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0)(_send_signal).options(scheduling_strategy=where)
        with _in_one_line(f"no signal reached node {process.node_id}"):
            ray.get(remote.remote(process.pid, int(number)), timeout=STATUS_TIMEOUT_S)

    def _ask(self, method: str, timeout_s: float, *args: Any) -> Any:
        try:
            controller = ray.get_actor(controller_name(self.group), namespace=NAMESPACE)
            return ray.get(getattr(controller, method).remote(*args), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ClusterError):
                raise error.cause from None
            raise ClusterError(f"the expert controller failed: {error.cause!r}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(f"the expert controller did not answer in {timeout_s:g} s") from error
        except (ray.exceptions.RayActorError, ValueError) as error:
            raise ClusterError("the expert controller is being restarted: try again in a few seconds") from error

    def _find_group(self) -> str:
        names = (a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE)
        groups = [group for name in names if (group := group_of_controller(name)) is not None]
        if not groups:
            raise SetupError(f"there is a Ray cluster, but nothing is served on it: {CONNECT_HINT}")
        served = [group for group in groups if group.startswith("moe-")]
        return served[-1] if served else groups[-1]


@contextmanager
def _in_one_line(failed: str) -> Iterator[None]:
    """Raises ClusterError for Ray's errors, whose texts are whole tracebacks."""
    try:
        yield
    except (ray.exceptions.RayError, RayServeException) as error:
        reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        raise ClusterError(f"{failed}: {lines[0]}") from error


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
