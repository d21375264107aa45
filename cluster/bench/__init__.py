"""`moe-cluster bench`: tokens/s of the cluster beside another system on one checkpoint. Knows no Ray.

`command`: arguments.  `session`: one run from start to report.  `checkpoint`: what is measured on.
`systems`, `cluster_system`, `transformers_system`: what is measured.  `throughput`: how.  `worker`: one system in
a process of its own.  `machine`, `report`: what is told.
"""

from cluster.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
