"""Computes how many attention replicas Serve should run, from waiting sequences and the use of the KV caches.

Serve's own policy counts requests; but a few long ones may fill a replica, and many short ones leave it half empty.
"""

import math
from collections.abc import Sequence
from typing import Any

from cluster.types import EngineStats

POLICY = "cluster.runtime.autoscaling:replicas_by_load"
KV_FULL = 0.85  # average use of the caches' blocks from which one replica more starts, before sequences lose blocks
KV_FITS = 0.6  # highest use of the remaining caches after a replica has gone
SEATS_FIT = 0.7  # highest use of the remaining seats after a replica has gone


def engine_load(stats: EngineStats, max_num_seqs: int) -> dict[str, float]:
    """The figures of a replica that Serve collects, by name."""
    return {
        "running": float(stats.running),
        "waiting": float(stats.waiting),
        "kv_use": stats.used_blocks / max(1, stats.num_blocks),
        "seats": float(max_num_seqs),
    }


def wanted_replicas(
    current: int, *, running: Sequence[float], waiting: Sequence[float], kv_use: Sequence[float], seats: float
) -> int:
    """running, waiting, kv_use: of each replica, lately.  seats: sequences that one replica runs at a time."""
    if not running:
        return current
    queue = sum(waiting)
    if queue >= 1:
        return current + math.ceil(queue / seats)
    if sum(kv_use) / len(kv_use) > KV_FULL:
        return current + 1
    fewer = current - 1
    if fewer and sum(running) <= SEATS_FIT * seats * fewer and sum(kv_use) <= KV_FITS * fewer:
        return fewer
    return current


def replicas_by_load(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy function. context: `ray.serve.config.AutoscalingContext`."""
    metrics = {name: list(by_replica.values()) for name, by_replica in (context.aggregated_metrics or {}).items()}
    wanted = wanted_replicas(
        context.target_num_replicas,
        running=metrics.get("running", ()),
        waiting=metrics.get("waiting", ()),
        kv_use=metrics.get("kv_use", ()),
        seats=max(metrics.get("seats", ()), default=1.0),
    )
    return wanted, context.policy_state


def autoscaling_config(min_replicas: int, max_replicas: int) -> dict[str, Any]:
    """For Serve. One more replica starts in tens of seconds; one that goes takes its prefix cache along."""
    return {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "initial_replicas": min_replicas,
        "metrics_interval_s": 2.0,
        "look_back_period_s": 10.0,
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
        "policy": {"policy_function": POLICY},
    }
