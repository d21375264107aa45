"""Makes the metrics of each role. Knows no role: those are in `engine` and `experts`.

Each role's class takes the process's registry and makes or shares its metrics there, so that several shards
of one process can stand in one registry. Children of labels are resolved once and kept: their methods run for
each step, layer and shard. They may be called from several threads.

Gauges are `livesum` where two processes with the same labels both count (a replica that drains beside its successor),
`livemostrecent` where the newer value replaces the older. Both go with their process.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

GaugeMode = Literal["livesum", "livemostrecent"]
M = TypeVar("M", bound=MetricWrapperBase)


class Definitions:
    """Makes metrics in a registry, or returns the one that the registry has under the same name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._get(Counter, name, text, labels)

    def gauge(self, name: str, text: str, mode: GaugeMode, *labels: str) -> Gauge:
        return self._get(Gauge, name, text, labels, multiprocess_mode=mode)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return self._get(Histogram, name, text, labels, buckets=buckets)

    def _get(self, kind: type[M], name: str, text: str, labels: Sequence[str], **options: Any) -> M:
        # prometheus_client has no public look-up by name.
        existing = self.registry._names_to_collectors.get(name)
        if isinstance(existing, kind):
            return existing
        return kind(name, text, labels, registry=self.registry, **options)
