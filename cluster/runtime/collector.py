"""The actor that serves /metrics for all processes of its node."""

from cluster.metrics import NodeCollector
from cluster.runtime.actors import prepare_process
from cluster.runtime.protocol import metrics_dir


class NodeMetricsActor:
    """One a node, made by the controller and gone with it."""

    def __init__(self, group: str, host: str, port: int) -> None:
        prepare_process(1)
        self._collector = NodeCollector(metrics_dir(group), host, port)
        self._port = self._collector.start()
        self._host = host

    def address(self) -> str:
        """Where Prometheus scrapes this node."""
        return f"http://{self._host}:{self._port}/metrics"
