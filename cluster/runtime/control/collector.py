"""One actor on each node serves /metrics for all its processes, and deletes the logs of dead ones."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ClusterConfig
from cluster.metrics import NodeCollector
from cluster.runtime.bounds import DEAD_LOG_BYTES, clear_logs, open_files
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import NAMESPACE, metrics_name
from cluster.runtime.process import metrics_dir, prepare_process
from cluster.runtime.ray_private.core import logs_folder

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 1.0
SWEEP_INTERVAL_S = 600.0  # between two looks at the log files of ended processes


class NodeMetricsActor:
    """One a node, made by the controller and gone with it."""

    def __init__(self, directory: str, host: str, port: int) -> None:
        prepare_process()
        self._collector = NodeCollector(Path(directory), host, port)
        self._port = self._collector.start()
        self._host = host
        max_bytes = os.environ.get(DEAD_LOG_BYTES)
        if max_bytes and Path("/proc/self/fd").is_dir():  # not where another's Ray is used
            threading.Thread(target=_sweep, args=(logs_folder(), int(max_bytes)), name="logs", daemon=True).start()

    def address(self) -> str:
        """Where Prometheus scrapes this node."""
        return f"http://{self._host}:{self._port}/metrics"

    def render(self) -> bytes:
        """One scrape, in Prometheus' text format."""
        return self._collector.render()


def _sweep(folder: Path, max_bytes: int) -> None:
    while True:
        clear_logs(folder, max_bytes, in_use=open_files())
        time.sleep(SWEEP_INTERVAL_S)


class NodeCollectors:
    """An actor on each node of the Ray cluster. Used by the controller's event loop."""

    def __init__(self, group: str) -> None:
        self._group, self._gcs = group, GcsThread()
        self._of_node: dict[str, tuple[Any, str]] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address for _, address in self._of_node.values())

    async def keep(self, config: ClusterConfig) -> None:
        """Makes those that are missing: on a new node, or where one died."""
        nodes = await self._gcs.ask(ray.nodes)
        alive: Mapping[str, str] = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
        for node_id in list(self._of_node):
            if node_id not in alive or not await _lives(self._of_node[node_id][0]):
                del self._of_node[node_id]
        for node_id in alive.keys() - self._of_node.keys():
            handle = await self._gcs.ask(self._make, node_id, config)
            try:
                self._of_node[node_id] = (handle, await handle.address.remote())
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                log.error("%s: no metrics from node %s: %s", self._group, alive[node_id], error)

    def _make(self, node_id: str, config: ClusterConfig) -> Any:
        return (
            ray.remote(NodeMetricsActor)
            .options(
                name=metrics_name(self._group, node_id),
                namespace=NAMESPACE,
                get_if_exists=True,  # that of a controller that died, which goes soon
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(str(metrics_dir(self._group)), config.metrics_host, config.metrics_port)
        )

    def close(self) -> None:
        for handle, _ in self._of_node.values():
            ray.kill(handle)


async def _lives(collector: Any) -> bool:
    """False for one that died; one that is slow to answer is still there."""
    with suppress(TimeoutError):
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await collector.address.remote()
        except ray.exceptions.RayActorError:
            return False
    return True
