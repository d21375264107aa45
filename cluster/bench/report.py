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
        f"{workload.output_tokens} generated, greedy. {measured}: median of {workload.repeats} "
        f"(lowest-highest), and as a ratio to {report.reference}.",
        "",
        *markdown_table(_latency_rows(report) if latency else _rows(report)),
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


def _rows(report: Report) -> list[tuple[str, ...]]:
    reference = {
        point.batch: point for result in report.results if result.name == report.reference for point in result.points
    }
    rows: list[tuple[str, ...]] = [("batch", "system", "prefill", "ratio", "decode", "ratio")]
    for batch in report.workload.batches:
        for result in report.results:
            for point in result.points:
                if point.batch == batch:
                    rows.append((str(batch), result.name, *_cells(point, reference.get(batch))))
    return rows


def _latency_rows(report: Report) -> list[tuple[str, ...]]:
    """As _rows, in milliseconds: a batch's first tokens come together, then one of each sequence a step."""
    rows: list[tuple[str, ...]] = [("batch", "system", "first token", "ratio", "between tokens", "ratio")]
    num_prompt = report.workload.prompt_tokens
    reference = {p.batch: p for result in report.results if result.name == report.reference for p in result.points}
    for batch in report.workload.batches:
        for result in report.results:
            for point in (p for p in result.points if p.batch == batch):
                first, between = point.prefill.inverse(1000 * batch * num_prompt), point.decode.inverse(1000 * batch)
                cells = [_text(first), "-", _text(between), "-"]
                if base := reference.get(batch):
                    cells[1] = f"{base.prefill.median / point.prefill.median:.2f}"
                    cells[3] = f"{base.decode.median / point.decode.median:.2f}"
                rows.append((str(batch), result.name, *cells))
    return rows


def _cells(point: Point, reference: Point | None) -> tuple[str, ...]:
    if reference is None:
        return _text(point.prefill), "-", _text(point.decode), "-"
    return (
        _text(point.prefill),
        f"{point.prefill.median / reference.prefill.median:.2f}",
        _text(point.decode),
        f"{point.decode.median / reference.decode.median:.2f}",
    )


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
