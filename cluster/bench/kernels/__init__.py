"""`moe-cluster bench kernels`: each kernel by variant and threads, beside torch's own and a plain read of memory.

`session`: one run from the shapes to the report.  `case`: a kernel at one size, in several ways.  `timing`: times them.
`reading`, `products`, `quantized`, `experts`, `attention`, `sampling`: the cases.  `table`: the report.
"""

from cluster.bench.kernels.session import measure_kernels

__all__ = ["measure_kernels"]
