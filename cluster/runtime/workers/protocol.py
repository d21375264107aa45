"""Values that the controller, shards and engines send each other, and how long each waits for the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.config import ClusterConfig
from cluster.evolving import evolving
from cluster.experts.placement import PlacementPlan

LONG_POLL_S = 10.0  # how long a question for news waits at the controller
REPLICA_SILENCE_S = 2.5 * LONG_POLL_S  # an engine asks for the plan once a long poll; a dead one no more
LEASE_S = 60.0  # a controller that nobody has needed for so long takes its shards down; longer than a Serve redeploy
Slice = Mapping[int, Sequence[int]]  # layer id -> expert ids
NO_SHARD = -1  # a spare process gives it for its shard's id


async def expert_tokens(shard: Any) -> np.ndarray | None:
    """Asks an `ExpertShardActor` for its `expert_tokens`. Raises RayError."""
    try:
        counts = await shard.expert_tokens.remote(as_array=True)
    except TypeError:  # it is of an older version, and answers with a tensor
        counts = await shard.expert_tokens.remote()
    return None if counts is None else np.asarray(counts)


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A plan and the actor of each shard that is up. A shard that is being replaced has none.

    take_traces: those of them that take the spans of a batch with a Ray call.
    """

    plan: PlacementPlan
    handles: Mapping[int, Any]
    take_traces: frozenset[int] = frozenset()


@evolving("cluster.runtime.protocol")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A controller leaves it with the shards for its successor. version: grows with every change."""

    version: float
    plan: PlacementPlan
    target: int
    config: ClusterConfig
