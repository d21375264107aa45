"""`moe-cluster bench`: tokens/s of the cluster beside another system on one checkpoint. Knows no Ray.

`command`: arguments.  `session`: one run from start to report.  `checkpoint`: what is measured on.
`systems`, `cluster_system`, `transformers_system`, `vllm_system`: what is measured.  `throughput`: how.  `worker`: one
system in a process of its own.  `round_trip`: carriers by themselves.  `load`: a running server.
`machine`, `report`, `plot`: what is told.
"""

from cluster.bench.command import add_arguments, run, with_part

__all__ = ["add_arguments", "run", "with_part"]
