"""The report of one run: Markdown for people and BENCHMARKS.md, JSON for machines. Measures nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.bench.machine import Machine
from cluster.bench.throughput import Point, Spread, Workload
from cluster.bench.worker import SystemResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """reference: the system that the others are divided by.  failures: the errors of systems without figures."""

    machine: Machine
    checkpoint: str
    workload: Workload
    reference: str
    results: tuple[SystemResult, ...]
    failures: tuple[str, ...] = ()


def to_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2) + "\n"


def to_markdown(report: Report, latency: bool = False) -> str:
    """The machine, the table (median, lowest-highest, ratio to the reference), the systems.

    Tokens/s; with `latency` milliseconds to the first token and between tokens.
    """
    workload = report.workload
    measured = "Milliseconds" if latency else "Tokens/s"
    lines = [
        describe_machine(report.machine),
        "",
        f"Checkpoint: {report.checkpoint}; random prompts of {workload.prompt_tokens} tokens, "
        f"{workload.output_tokens} generated, {', '.join(s.describe() for s in workload.samplings)}. "
        f"{measured}: median of {workload.repeats} (lowest-highest), and as a ratio to {report.reference}.",
        "",
        *markdown_table(_rows(report, latency)),
        "",
        *(f"- {result.name}: {result.detail}; ready in {result.load_s:.1f} s" for result in report.results),
        *(f"- FAILED: {failure}" for failure in report.failures),
    ]
    return "\n".join(lines) + "\n"


def describe_machine(machine: Machine) -> str:
    features = f" ({', '.join(machine.cpu_features)})" if machine.cpu_features else ""
    gpus = "".join(f", {gpu}" for gpu in machine.gpus)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions)
    return (
        f"Machine: {machine.num_cores} cores of {machine.cpu}{features}, "
        f"{machine.memory_bytes / 2**30:.0f} GiB memory{gpus}; {versions}."
    )


def _rows(report: Report, latency: bool) -> list[list[str]]:
    """A row for each batch size, sampling and system. A run with one sampling has no column for it."""
    points = {(point.batch, point.sampling, result.name): point for result in report.results for point in result.points}
    several = len(report.workload.samplings) > 1
    first, second = ("first token", "between tokens") if latency else ("prefill", "decode")
    rows = [["batch", *(["sampling"] if several else []), "system", first, "ratio", second, "ratio"]]
    for batch in report.workload.batches:
        for sampling in report.workload.samplings:
            base = points.get((batch, sampling.name, report.reference))
            for result in report.results:
                point = points[batch, sampling.name, result.name]
                cells = [str(batch), *([sampling.name] if several else []), result.name]
                values = _latencies(point, report.workload.prompt_tokens) if latency else (point.prefill, point.decode)
                for value, ratio in zip(values, _ratios(point, base, latency), strict=True):
                    cells += [_text(value), ratio]
                rows.append(cells)
    return rows


def _latencies(point: Point, prompt_tokens: int) -> tuple[Spread, Spread]:
    """Milliseconds: a batch's first tokens come together, then one of each sequence a step."""
    return point.prefill.inverse(1000 * point.batch * prompt_tokens), point.decode.inverse(1000 * point.batch)


def _ratios(point: Point, base: Point | None, latency: bool) -> tuple[str, str]:
    if base is None:
        return "-", "-"
    ratios = point.prefill.median / base.prefill.median, point.decode.median / base.decode.median
    prefill, decode = (1 / ratio if latency else ratio for ratio in ratios)
    return f"{prefill:.2f}", f"{decode:.2f}"


def _text(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.low)}-{_number(spread.high)})"


def _number(value: float) -> str:
    """Three figures or all before the point: 12.4, 106, 1050."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that also reads well as it is; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return lines
