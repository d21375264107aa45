"""`moe-cluster bench`: carries out the part that the arguments name.

Imports of torch and the cluster happen in `run`, through `session`: `--help` answers at once.
"""

import argparse
from collections.abc import Sequence

from cluster.bench.limits import check_arguments

PARTS = (
    "throughput",
    "latency",
    "kernels",
    "transport",
    "serve",
    "prefixes",
    "growth",
    "context",
    "gpu",
    "calibrate",
    "plan-check",
    "scale",
)


def with_part(argv: Sequence[str]) -> list[str]:
    """The command line's arguments, with the part of `bench`: throughput, unless they name one."""
    if argv[:1] == ["bench"] and (len(argv) == 1 or argv[1] not in (*PARTS, "-h", "--help")):
        return ["bench", "throughput", *argv[1:]]
    return list(argv)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the report to stdout and returns the exit code: 1 when a system or a request failed.

    Raises SetupError for arguments that cannot be carried out.
    """
    check_arguments(args)
    if args.bench == "transport":
        from cluster.bench.round_trip import measure_round_trips

        return measure_round_trips(args)
    if args.bench == "kernels":
        from cluster.bench.kernels import measure_kernels

        return measure_kernels(args)
    if args.bench == "gpu":
        from cluster.bench.gpu import measure_gpu

        return measure_gpu(args)
    if args.bench == "growth":
        from cluster.bench.growth import measure_growth

        return measure_growth(args)
    if args.bench == "context":
        from cluster.bench.context import measure_context

        return measure_context(args)
    if args.bench == "serve":
        from cluster.bench.traffic import measure_server

        return measure_server(args)
    if args.bench == "prefixes":
        from cluster.bench.prefixes import measure_prefixes

        return measure_prefixes(args)
    if args.bench == "calibrate":
        from cluster.bench.planning.calibrate import measure_calibration

        return measure_calibration(args)
    if args.bench == "plan-check":
        from cluster.bench.planning.check import measure_check

        return measure_check(args)
    if args.bench == "scale":
        from cluster.bench.planning.scale import measure_scale

        return measure_scale(args)
    from cluster.bench.session import measure_all

    return measure_all(args)
