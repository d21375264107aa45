"""Draws for the command line. Knows no Ray."""

from cluster.console.base import ranges, size
from cluster.console.experts import ExpertCounts, expert_counts, expert_lines
from cluster.console.offline import Plan, describe_plan, print_findings, print_metrics, print_plan
from cluster.console.progress import CountProgress, LoadProgress
from cluster.console.status import (
    describe_cache,
    print_cluster,
    print_placement,
    print_status,
    render_status,
    watch_status,
)
from cluster.working import Working, awaited

__all__ = [
    "CountProgress",
    "ExpertCounts",
    "LoadProgress",
    "Plan",
    "Working",
    "awaited",
    "describe_cache",
    "describe_plan",
    "expert_counts",
    "expert_lines",
    "print_cluster",
    "print_findings",
    "print_metrics",
    "print_placement",
    "print_plan",
    "print_status",
    "ranges",
    "render_status",
    "size",
    "watch_status",
]
