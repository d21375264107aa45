"""`moe-cluster bench`: tokens/s of the cluster beside another system on one checkpoint. Knows no Ray.

`arguments`, `command`, `limits`: the command line.  `session`: one run from start to report.
`checkpoint`: where the weights come from.  `spec`: which system to measure.  `systems`: builds it, one of
`cluster_system`, `transformers_system`, `foreign_system`.  `worker`: runs it in a process of its own.
`throughput`: how to time it.  `sampling`: how it chooses tokens.
`kernels/`, `round_trip`: the kernels and the carriers alone.  `traffic`: a running server.
`growth`, `growth_points`: one setting after another.  `gpu`: the full model on one GPU.
`machine`, `report`, `plot`: the report.
"""

from cluster.bench.arguments import add_arguments
from cluster.bench.command import run, with_part

__all__ = ["add_arguments", "run", "with_part"]
