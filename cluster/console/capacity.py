"""Draws the hardware that a load needs."""

from typing import Any

import numpy as np

from cluster.console.base import OutputConsole
from cluster.planning.capacity import Capacity, Hardware, Replay
from cluster.planning.search import PERCENTILE


def print_capacity(plan: Capacity) -> None:
    """Prints a few lines below the plan of the same shards."""
    console, cluster, goal, trial = OutputConsole(), plan.trial.cluster, plan.goal, plan.trial
    tokens_s = goal.rate * goal.lengths.output_tokens
    shards = f" and {_counted(cluster.shards, 'expert shard')}" if cluster.shards else ""
    each = "a GPU" if plan.hardware.cores is None else "a core"
    first, late = trial.first_token_s
    busy = ", ".join(f"{name} {share:.0%}" for name, share in plan.busy.items())
    lines = [
        f"{goal.rate:g} requests/s, with prompts of {_counted(goal.lengths.prompt_tokens, 'token')} and answers of "
        f"{goal.lengths.output_tokens:,}, need {_counted(cluster.replicas, 'attention replica')}{shards}: "
        f"{plan.num_units:,} x {plan.hardware.name}, {each} for each process",
        f"expected: {tokens_s:,.0f} output tokens/s; first token after {first:.3g} s ({PERCENTILE} %: {late:.3g})"
        + _further(plan),
        f"cost: {plan.unit_seconds:,.0f} {_unit(plan.hardware)} seconds for a million output tokens",
        f"busy: {busy}; bottleneck: {plan.bottleneck}",
        f"each attention replica caches {plan.cache_tokens:,} tokens",
        f"figures: {plan.hardware.source}",
    ]
    if trial.is_cut:
        lines.append(
            f"simulated: {trial.num_requests:,} requests, the first {trial.num_requests / goal.rate:,.0f} s of the "
            "load; what waits longer than that is not seen"
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
        "simulated_requests": trial.num_requests,
        "unit_seconds_per_million_output_tokens": plan.unit_seconds,
        "busy": plan.busy,
        "step_ms": plan.step_ms,
        "bottleneck": plan.bottleneck,
        "cache_tokens": plan.cache_tokens,
        "source": plan.hardware.source,
    }


def describe_replay(found: Replay) -> dict[str, Any]:
    """Seconds of the requests that were answered, of 50, 90 and 99 %."""
    record = found.record
    seconds = {
        name: [float(value) for value in np.percentile(some, (50, 90, 99))] if some else []
        for name, some in (
            ("first_token_s", record.first_token_s), ("per_token_s", record.per_token_s), ("answer_s", record.whole_s),
        )
    }  # fmt: skip
    return {
        "requests": found.num_requests,
        "answered": len(record.whole_s),
        "refused": record.refused,
        "preempted": record.preempted,
        "failures": record.failures,
        "most_replicas": record.most_replicas,
        "took_s": record.end_s,
        "output_tokens_per_s": record.output_tokens / max(record.end_s, 1e-9),
        "unit_seconds_per_million_output_tokens": 1e6 * found.unit_seconds / max(1, record.output_tokens),
        **seconds,
    }


def print_replay(found: Replay) -> None:
    """Prints a few lines."""
    console, facts = OutputConsole(), describe_replay(found)
    cost = facts["unit_seconds_per_million_output_tokens"]
    lines = [
        f"{_counted(facts['requests'], 'request')} in {facts['took_s']:,.0f} s: {facts['answered']:,} answered, "
        f"{facts['refused']:,} refused; the caches were full {_counted(facts['preempted'], 'time')}",
        f"{_counted(facts['failures'], 'death')} of processes, at most "
        f"{_counted(facts['most_replicas'], 'attention replica')} at a time",
        f"{facts['output_tokens_per_s']:,.0f} output tokens/s; {cost:,.0f} {_unit(found.hardware)} seconds for a "
        "million output tokens",
    ]
    for name, words in (
        ("first_token_s", "first token after"), ("per_token_s", "each further one after"),
        ("answer_s", "whole answer after"),
    ):  # fmt: skip
        if facts[name]:
            low, high, most = facts[name]
            lines.append(f"{words} {low:.3g} s (90 %: {high:.3g}, 99 %: {most:.3g})")
    for line in lines:
        console.print(line, highlight=False)


def _further(plan: Capacity) -> str:
    """Of the tokens after the first, where there are some."""
    if plan.goal.lengths.output_tokens == 1:
        return ""
    token, slow = plan.trial.per_token_s
    return f", each further one after {1000 * token:.3g} ms ({PERCENTILE} %: {1000 * slow:.3g})"


def _unit(hardware: Hardware) -> str:
    return "GPU" if hardware.cores is None else "machine"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
