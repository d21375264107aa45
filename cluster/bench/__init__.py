"""`moe-cluster bench`: tokens/s of the cluster beside another system on one checkpoint. Knows no Ray.

`command`: arguments.  `session`: one run from start to report.  `checkpoint`: where the weights come from.
`spec`: which system to measure.  `systems`: builds it, one of `cluster_system`, `transformers_system`,
`foreign_system`.  `throughput`: how to time it.  `worker`: runs it in a process of its own.
`round_trip`: the carriers alone.  `traffic`: a running server.  `growth`, `growth_points`: one setting after another.
`gpu`: the full model on one GPU.  `machine`, `report`, `plot`: the report.
"""

from cluster.bench.command import add_arguments, run, with_part

__all__ = ["add_arguments", "run", "with_part"]
