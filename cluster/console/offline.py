"""Draws for commands without a cluster: a plan, a machine's state, an excerpt of metrics."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cluster.console.base import OutputConsole, ranges, size
from cluster.doctor import Finding
from cluster.experts.placement import PlacementPlan


def print_plan(plan: PlacementPlan, dtype: str, expert_bytes: int, dense_bytes: int, kv_bytes_per_token: int) -> None:
    """Prints which expert would go where, and the bytes of each process."""
    console = OutputConsole()
    table = Table(
        "process",
        "experts of each sparse layer",
        "experts",
        "weights",
        title=f"{len(plan.layer_ids) or 'no'} sparse layers, {dtype}",
    )
    table.add_row("attention replica", "dense weights", "", size(dense_bytes))
    for shard_id, layers in enumerate(plan.slices):
        count = sum(len(ids) for ids in layers.values())
        shown = ranges(next(iter(layers.values()), ()))
        table.add_row(f"expert shard {shard_id}", shown, str(count), size(count * expert_bytes))
    console.print(table)
    console.print(
        f"KV cache: {size(kv_bytes_per_token)} a token, for each attention replica beside its weights, of 0.9 of the "
        "memory that is free on a GPU then, or 0.5 of a machine's (--kv-cache-bytes, --memory-utilization)",
        highlight=False,
    )


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints a machine's and an installation's state; an advice stands below its line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = "missing" if finding.missing else "look" if finding.advice else "ok"
        style = {"missing": "bold red", "look": "yellow", "ok": "green"}[mark]
        advice = f"\n→ {finding.advice}" if finding.advice else ""
        table.add_row(Text(mark, style=style), Text(finding.subject), Text(finding.found + advice))
    console = OutputConsole()
    console.print(table)
    num_missing = sum(finding.missing for finding in findings)
    console.print(Text(f"{num_missing} missing: nothing can be served" if num_missing else "this machine can serve"))


def print_metrics(text: str, names: tuple[str, ...]) -> None:
    """Prints an excerpt of a Prometheus exposition."""
    print("\nmetrics (excerpt):")
    for line in text.splitlines():
        if line.startswith(names):
            print(f"  {line}")
