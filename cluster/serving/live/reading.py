"""All that is read of a cluster at a moment, and the seam behind which it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.status import ClusterStatus
from cluster.types import EngineStats

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """status: as the controller last gave it.
    counters: of each shard's process (shard id, pid): [sparse layers, experts], tokens since the process's start.
    stats: of each attention replica that answers, by its name.
    exposition: the figures of all nodes in Prometheus' text format, "" where there is no news of them.
    at: seconds of a monotonic clock.
    """

    status: ClusterStatus
    counters: Mapping[tuple[int, int], Counts]
    stats: Mapping[str, EngineStats]
    exposition: str
    at: float


class LiveSource(Protocol):
    """Reads a cluster. Nobody calls it while nobody watches."""

    async def read(self) -> Reading:
        """Raises Unavailable when the cluster gives no word."""
        ...
