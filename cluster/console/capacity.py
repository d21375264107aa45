"""Draws the hardware that a load needs."""

from typing import Any

from cluster.console.base import OutputConsole
from cluster.planning.capacity import Capacity
from cluster.planning.search import PERCENTILE


def print_capacity(plan: Capacity) -> None:
    """Prints a few lines below the plan of the same shards."""
    console, cluster, goal, trial = OutputConsole(), plan.trial.cluster, plan.goal, plan.trial
    tokens_s = goal.rate * goal.lengths.output_tokens
    shards = f" and {_counted(cluster.shards, 'expert shard')}" if cluster.shards else ""
    units = (
        f"{plan.num_units} {plan.hardware.name}, one for each process"
        if plan.hardware.cores is None
        else f"{plan.num_units} x {plan.hardware.name}, a core for each process"
    )
    (first, late), (token, slow) = trial.first_token_s, trial.per_token_s
    busy = ", ".join(f"{name} {share:.0%}" for name, share in plan.busy.items())
    lines = (
        f"for {goal.rate:g} requests/s of {goal.lengths.prompt_tokens:,} and {goal.lengths.output_tokens:,} tokens: "
        f"{_counted(cluster.replicas, 'attention replica')}{shards}, {units}",
        f"expected: {tokens_s:,.0f} output tokens/s; first token after {first:.3g} s ({PERCENTILE} %: {late:.3g}), "
        f"each further one after {1000 * token:.3g} ms ({PERCENTILE} %: {1000 * slow:.3g})",
        f"cost: {plan.unit_seconds:,.0f} seconds of a {_unit(plan)} for a million output tokens",
        f"busy: {busy}; bottleneck: {plan.bottleneck}",
        f"each attention replica caches {plan.cache_tokens:,} tokens",
        f"figures: {plan.hardware.source}",
    )
    for line in lines:
        console.print(line, highlight=False)


def describe_capacity(plan: Capacity) -> dict[str, Any]:
    """The same for machines to read."""
    trial, goal = plan.trial, plan.goal
    return {
        "hardware": plan.hardware.name,
        "units": plan.num_units,
        "attention_replicas": trial.cluster.replicas,
        "expert_shards": trial.cluster.shards,
        "requests_per_s": goal.rate,
        "output_tokens_per_s": goal.rate * goal.lengths.output_tokens,
        "first_token_s": {"median": trial.first_token_s[0], f"p{PERCENTILE}": trial.first_token_s[1]},
        "per_token_s": {"median": trial.per_token_s[0], f"p{PERCENTILE}": trial.per_token_s[1]},
        "unit_seconds_per_million_output_tokens": plan.unit_seconds,
        "busy": plan.busy,
        "step_ms": plan.step_ms,
        "bottleneck": plan.bottleneck,
        "cache_tokens": plan.cache_tokens,
        "source": plan.hardware.source,
    }


def _unit(plan: Capacity) -> str:
    return "GPU" if plan.hardware.cores is None else "machine"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
