"""The settings of `moe-cluster bench growth`. Measures nothing."""

import argparse
from dataclasses import dataclass, replace

from cluster.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """One setting. axis: the name of the value that varies.  step_ms: of a decode step, the median of the repeats."""

    axis: str
    batch: int
    context: int
    shards: int
    layers: int
    step_ms: float = 0.0

    @property
    def value(self) -> int:
        """Its place on its axis."""
        return int(getattr(self, self.axis))


def plan_points(args: argparse.Namespace) -> list[GrowthPoint]:
    """The points of each axis: one value varies, the others are those of one middle. Raises SetupError."""
    for option, values in (
        ("batch", args.batch), ("context", args.context), ("shards", args.shards), ("layers", (args.layers,)),
        ("repeat", (args.repeat,)),
    ):  # fmt: skip
        if min(values) < 1:
            raise SetupError(f"--{option} has {min(values)}, numbers from 1 are needed")
    middle = GrowthPoint(axis="batch", batch=8, context=64, shards=2, layers=args.layers)
    axes = {"batch": args.batch, "context": args.context, "shards": args.shards}
    if args.shapes == "a2.7b":  # the demo checkpoint has one depth
        axes["layers"] = tuple(sorted({max(1, args.layers // 4), max(1, args.layers // 2), args.layers}))
    return [replace(middle, axis=axis, **{axis: value}) for axis, values in axes.items() for value in values]
