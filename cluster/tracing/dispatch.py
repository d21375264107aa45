"""Sums of what crosses to the shards in a step that is traced, beside the metrics. Loads no OpenTelemetry."""

from dataclasses import dataclass

from cluster.metrics import CollectorRegistry, DispatchMetrics


@dataclass(slots=True)
class Crossings:
    """To one shard, in one step. A crossing is of one layer's rows, or of a part of them.

    round_trip_s: of all together, and the longest.  rerouted_rows: that this shard failed.
    """

    crossings: int = 0
    rows: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    round_trip_s: float = 0.0
    longest_s: float = 0.0
    fallbacks: int = 0
    hedged: int = 0
    rerouted_rows: int = 0


class TracedDispatchMetrics(DispatchMetrics):
    """The metrics of a process that traces. Used by one thread, but for what reads metrics."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        super().__init__(registry, replica)
        self._step: dict[int, Crossings] | None = None

    def begin(self) -> None:
        """A step that is traced begins."""
        self._step = {}

    def end(self) -> dict[int, Crossings]:
        """It has ended; by shard."""
        step, self._step = self._step, None
        return step or {}

    def sent(self, shard_id: int, rows: int, num_bytes: int) -> None:
        super().sent(shard_id, rows, num_bytes)
        if self._step is not None:
            found = self._step.setdefault(shard_id, Crossings())
            found.crossings += 1
            found.rows += rows
            found.sent_bytes += num_bytes

    def returned(self, shard_id: int, seconds: float, num_bytes: int) -> None:
        super().returned(shard_id, seconds, num_bytes)
        if self._step is not None:
            found = self._step.setdefault(shard_id, Crossings())
            found.received_bytes += num_bytes
            found.round_trip_s += seconds
            found.longest_s = max(found.longest_s, seconds)

    def fell_back(self, shard_id: int) -> None:
        super().fell_back(shard_id)
        if self._step is not None:
            self._step.setdefault(shard_id, Crossings()).fallbacks += 1

    def hedged(self, shard_id: int) -> None:
        super().hedged(shard_id)
        if self._step is not None:
            self._step.setdefault(shard_id, Crossings()).hedged += 1

    def rerouted(self, shard_id: int, rows: int) -> None:
        super().rerouted(shard_id, rows)
        if self._step is not None:
            self._step.setdefault(shard_id, Crossings()).rerouted_rows += rows
