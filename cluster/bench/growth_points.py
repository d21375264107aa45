"""The settings of `moe-cluster bench growth`. Measures nothing."""

import argparse
from dataclasses import dataclass, replace

from cluster.bench.checkpoint import layers_of
from cluster.checkpoint.made.published import SHAPES
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
    layers = layers_of(args.shapes) if args.layers is None else args.layers
    for option, values in (
        ("batch", args.batch), ("context", args.context), ("shards", args.shards), ("layers", (layers,)),
        ("repeat", (args.repeat,)),
    ):  # fmt: skip
        if min(values) < 1:
            raise SetupError(f"--{option} has {min(values)}, numbers from 1 are needed")
    middle = GrowthPoint(axis="batch", batch=8, context=64, shards=2, layers=layers)
    axes = {"batch": args.batch, "context": args.context, "shards": args.shards}
    if SHAPES.get(args.shapes, {}).get("model_type") == "qwen2":  # a dense model has no shards
        middle = replace(middle, shards=0)
        del axes["shards"]
    if args.shapes != "demo":  # the demo checkpoint has one depth
        axes["layers"] = tuple(sorted({max(1, layers // 4), max(1, layers // 2), layers}))
    return [replace(middle, axis=axis, **{axis: value}) for axis, values in axes.items() for value in values]
