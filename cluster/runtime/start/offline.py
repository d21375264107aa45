"""Expert shards on Ray for one engine in this process, without an application."""

import atexit
import logging
import time
import uuid
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.errors import ClusterError, SetupError
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.transport import ExpertTransport
from cluster.metrics import DispatchMetrics
from cluster.runtime.control.controller import get_controller
from cluster.runtime.names import shard_prefix
from cluster.runtime.process import process_info
from cluster.runtime.start.application import check_config, check_cpus, check_gpus, check_memory, resolve_gpus
from cluster.runtime.start.groups import OnStatus, StatusReports, close_controller
from cluster.runtime.start.local_ray import start_ray
from cluster.runtime.workers.directory import ShardDirectory
from cluster.runtime.workers.transports import lanes_of, make_transport

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 2.0  # between two counts of shards that wait for resources
ROOM_TIMEOUT_S = 60.0
JOIN_TIMEOUT_S = 5.0


class RayExperts:
    """Expert shards on Ray actors for one engine in this process; `dispatcher` reaches them. Close it; the end of the
    process closes it, too."""

    def __init__(
        self,
        config: ClusterConfig,
        metrics: DispatchMetrics,
        on_status: OnStatus | None = None,
        room_timeout_s: float = ROOM_TIMEOUT_S,
    ) -> None:
        """Blocks until the shards have their weights. Raises SetupError, also for shards that found no room in
        `room_timeout_s`."""
        config = check_config(config, tokenizer=False)
        if not ray.is_initialized():
            check_cpus(config)
            check_memory(config)
        self._controller: Any = None
        self._directory: ShardDirectory | None = None
        self._transport: ExpertTransport | None = None
        self._lost = ""
        self._ray = start_ray(
            num_cpus=config.expert_shards * config.cpus_per_expert_shard, on_lost=lambda reason: self._lose(reason)
        )
        atexit.register(self.close)  # registered after Ray's handler, so it runs before that
        try:
            config = resolve_gpus(config)
            check_gpus(config, attention_replicas=0)
            self._group = f"llm-{uuid.uuid4().hex[:8]}"  # of this object alone
            self._controller = get_controller(self._group, config, collect_metrics=False)
            self._directory = ShardDirectory(self._controller, "llm", process_info(), None)
            with StatusReports(self._group, on_status):
                self._wait_ready(config, room_timeout_s)
        except BaseException:
            self.close()
            raise
        self._transport = make_transport(config, self._directory, metrics)
        self.dispatcher = ExpertDispatcher(
            self._transport,
            self._directory,
            metrics,
            shard_timeout_s=config.shard_timeout_s,
            recovery_timeout_s=config.recovery_timeout_s,
            lanes=lanes_of(self._transport),
        )

    def adapt(self, wanted: AdapterList) -> None:
        """Gives all shards the adapters that change their experts. Blocks. Raises ClusterError."""
        try:
            ray.get(self._controller.adapt_shards.remote(wanted))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ClusterError) else error from None

    def close(self) -> None:
        """Ends the shards, and Ray if this object started it and nothing else here uses it. Safe to call again."""
        atexit.unregister(self.close)
        if self._transport is not None:
            self._transport.close()
        if self._directory is not None:
            self._directory.close()
        if self._controller is not None and not self._lost and ray.is_initialized():
            close_controller(self._controller, self._group)
        if self._directory is not None:
            self._directory.join(0.0 if self._lost else JOIN_TIMEOUT_S)
        self._controller = None
        self._ray.stop()

    def _lose(self, reason: str) -> None:
        self._lost = f"the Ray of the expert shards has died: {reason}"
        if self._directory is not None:
            self._directory.lose(self._lost)

    def _wait_ready(self, config: ClusterConfig, room_timeout_s: float) -> None:
        """Logs how many shards wait for room in the Ray cluster. Raises SetupError when none finds any for so long."""
        assert self._directory is not None
        since, waiting = time.monotonic(), 0
        while not self._directory.wait_ready(LOOK_INTERVAL_S):
            before, waiting = waiting, self._num_waiting()
            if not waiting or waiting < before:
                since = time.monotonic()
            elif not before:
                log.warning("%s: waiting for %g s at most", _shortage(config, waiting), room_timeout_s)
            if waiting and time.monotonic() - since > room_timeout_s:
                raise SetupError(
                    f"{_shortage(config, waiting)}, and none came free in {room_timeout_s:g} s: end what has them, or "
                    "ask for fewer shards, or for less with cpus_per_expert_shard and gpus_per_expert_shard"
                )

    def _num_waiting(self) -> int:
        """Number of shards for which Ray has found no place; one whose process starts has a place."""
        groups = ray.util.placement_group_table().values()
        return sum(g["state"] == "PENDING" and g["name"].startswith(shard_prefix(self._group)) for g in groups)


def _shortage(config: ClusterConfig, waiting: int) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    wanted, present = [], []
    for name, each in (("CPU", config.cpus_per_expert_shard), ("GPU", config.gpus_per_expert_shard or 0.0)):
        if each:
            wanted.append(f"{each:g} {name}{'' if each == 1 else 's'} each ({config.expert_shards * each:g} in all)")
            present.append(f"{total.get(name, 0):g} {name}s, {free.get(name, 0):g} of them free")
    if config.expert_resource:
        present.append(f"{total.get(config.expert_resource, 0):g} nodes' worth of {config.expert_resource!r}")
    return (
        f"{waiting} of {config.expert_shards} expert shards find no room: they ask for {' and '.join(wanted)}, the Ray "
        f"cluster has {' and '.join(present)}"
    )
