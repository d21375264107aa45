"""Every figure that the cluster exports, and the port that serves them. Only here is prometheus_client known.

`ingress`, `engine`, `experts`, `responses`: one class a role, made with `definitions`.  `build`: a process's version.
`process`: its registry, and the files that it leaves for the node.  `exemplars`: traces beside histograms.
`collector`: `/metrics` for all processes of a node.
"""

from prometheus_client import CollectorRegistry

from cluster.metrics.build import report_version
from cluster.metrics.collector import NodeCollector
from cluster.metrics.engine import EngineMetrics
from cluster.metrics.experts import ControllerMetrics, DispatchMetrics, ShardMetrics
from cluster.metrics.ingress import IngressMetrics
from cluster.metrics.process import multiprocess_env, new_registry
from cluster.metrics.responses import ResponseStoreMetrics

__all__ = [
    "CollectorRegistry",
    "ControllerMetrics",
    "DispatchMetrics",
    "EngineMetrics",
    "IngressMetrics",
    "NodeCollector",
    "ResponseStoreMetrics",
    "ShardMetrics",
    "multiprocess_env",
    "new_registry",
    "report_version",
]
