"""A picture of a report, where matplotlib is installed. Measures nothing."""

import importlib.util
import itertools
from pathlib import Path

from cluster.bench.growth_points import GrowthPoint
from cluster.bench.report import Report
from cluster.errors import SetupError


def check_plot() -> None:
    """Raises SetupError before anything is measured that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("--plot: matplotlib is not installed; pip install 'moe-cluster[bench]' has it")


def plot_report(report: Report, path: Path) -> None:
    """Tokens/s against batch size, a line a system, prefill and decode side by side, the spread as bars."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, part in zip(axes, ("prefill", "decode"), strict=True):
        for result, sampling in itertools.product(report.results, report.workload.samplings):
            points = [point for point in result.points if point.sampling == sampling.name]
            spreads = [getattr(point, part) for point in points]
            medians = [spread.median for spread in spreads]
            below = [spread.median - spread.low for spread in spreads]
            above = [spread.high - spread.median for spread in spreads]
            batches = [point.batch for point in points]
            label = f"{result.name}, {sampling.name}" if len(report.workload.samplings) > 1 else result.name
            axis.errorbar(batches, medians, yerr=(below, above), marker="o", capsize=3, label=label)
        axis.set(title=part, xlabel="batch", ylabel="tokens/s", xscale="log")
        axis.set_xticks(report.workload.batches, [str(batch) for batch in report.workload.batches])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(report.checkpoint, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_growth(points: list[GrowthPoint], path: Path) -> None:
    """Milliseconds of a decode step, one picture for each axis."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.axis for point in points))
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        varied = [point for point in points if point.axis == name]
        axis.plot([point.value for point in varied], [point.step_ms for point in varied], marker="o")
        axis.set(xlabel=name, ylabel="ms for a decode step")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
