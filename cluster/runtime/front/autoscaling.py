"""How many attention replicas Serve should run: by sequences that wait and by the use of the KV caches.

Serve's own policy counts requests; here a replica may be full with a few long ones, or half empty with many short.
"""

import math
from collections.abc import Sequence
from typing import Any

from cluster.types import EngineStats

POLICY = "cluster.runtime.autoscaling:replicas_by_load"
KV_FULL = 0.85  # of the caches' blocks on average: one replica more, before sequences lose their blocks
KV_FITS = 0.6  # what one replica fewer may be filled to
SEATS_FIT = 0.7  # of the running sequences that one replica fewer may have


def engine_load(stats: EngineStats, max_num_seqs: int) -> dict[str, float]:
    """What a replica tells Serve, by name."""
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
    told = {name: list(by_replica.values()) for name, by_replica in (context.aggregated_metrics or {}).items()}
    wanted = wanted_replicas(
        context.target_num_replicas,
        running=told.get("running", ()),
        waiting=told.get("waiting", ()),
        kv_use=told.get("kv_use", ()),
        seats=max(told.get("seats", ()), default=1.0),
    )
    return wanted, context.policy_state


def autoscaling_config(min_replicas: int, max_replicas: int) -> dict[str, Any]:
    """For Serve. A replica more starts in tens of seconds; one that goes away costs its prefix cache."""
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
