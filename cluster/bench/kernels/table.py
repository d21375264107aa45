"""The report of `moe-cluster bench kernels`. Measures nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from cluster.bench.kernels.case import TORCH, Measured
from cluster.bench.machine import Machine
from cluster.bench.report import describe_machine, markdown_table

_EXPLAINED = """\
The fastest of torch's own ways, then each variant of the native kernels that this processor runs, in GB/s of weights or
keys and values, GFLOP/s or milliseconds. `now`: what this process would take, in milliseconds. `of a read`: its speed
over that of the fastest plain read of memory, in turns with it. `torch / now`: how many times faster than torch's own.
`plain cache`: attention over keys and values that are not in 8 bits. The ways take turns; least of {rounds} rounds."""


def to_markdown(
    machine: Machine, shapes: str, rounds: int, measured: Sequence[Measured], left_out: Sequence[str] = ()
) -> str:
    """left_out: a sentence for each case that was asked for and not measured."""
    lines = [describe_machine(machine), "", f"Shapes: {shapes}.", "", _EXPLAINED.format(rounds=rounds), ""]
    return "\n".join([*lines, *markdown_table(_rows(measured)), *(["", *left_out] if left_out else [])]) + "\n"


def to_json(
    machine: Machine, shapes: str, rounds: int, measured: Sequence[Measured], left_out: Sequence[str] = ()
) -> str:
    cases = [asdict(m) for m in measured]
    report = {"machine": asdict(machine), "shapes": shapes, "rounds": rounds, "cases": cases, "left_out": left_out}
    return json.dumps(report, indent=2) + "\n"


def _rows(measured: Sequence[Measured]) -> list[list[str]]:
    variants = list(dict.fromkeys(way for one in measured for way in one.seconds if not way.startswith(TORCH)))
    heads = ["kernel", "size", "threads", "unit", TORCH, *variants, "now", "of a read", "torch / now"]
    return [heads, *(_row(one, variants) for one in measured)]


def _row(one: Measured, variants: Sequence[str]) -> list[str]:
    shown = [one.torch_way, *(variant if variant in one.seconds else None for variant in variants)]
    cells = [_number(one.value(way)) if way is not None else "-" for way in shown]
    now = one.seconds.get(one.chosen)
    if now is None:
        return [one.kernel, one.size, str(one.threads), one.unit, *cells, "-", "-", "-"]
    of_read = f"{one.read_s / now:.2f}" if one.unit == "GB/s" and one.read_s else "-"
    of_torch = f"{one.seconds[one.torch_way] / now:.2f}" if one.torch_way is not None else "-"
    return [one.kernel, one.size, str(one.threads), one.unit, *cells, _number(1e3 * now), of_read, of_torch]


def _number(value: float) -> str:
    """Three figures, or all before the point: 0.024, 1.27, 26.1, 402."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"
