"""Traces beside histograms: of each bucket, the last request in it that was traced. Knows no metric.

prometheus_client keeps no exemplars where processes share their metrics by files. Here each process has one more file
in that folder, `exemplars_<pid>-<start>.json`, and the collector adds what it finds there.
"""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar

PATTERN = "exemplars_*.json"


class Exemplars:
    """Of one process. path: of its file; None: nobody collects, and nothing is kept."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._kept: dict[str, dict[str, tuple[str, float, float]]] = {}  # trace, value, when; by metric and bucket

    def note(self, metric: str, buckets: Sequence[float], value: float, trace_id: str) -> None:
        """A traced request had this value. Writes the file anew: 0.1 ms."""
        if self._path is None:
            return
        place = bisect_left(buckets, value)
        bound = str(float(buckets[place])) if place < len(buckets) else "+Inf"  # as prometheus_client writes them
        self._kept.setdefault(metric, {})[bound] = trace_id, value, self._clock()
        fresh = self._path.with_suffix(".new")
        with suppress(OSError):  # a full disk costs exemplars, no request
            fresh.write_text(json.dumps(self._kept))
            os.replace(fresh, self._path)


def add_exemplars(metrics: Iterable[Metric], directory: Path) -> None:
    """To the buckets of histograms that have no labels of their own; the latest of all processes."""
    latest: dict[tuple[str, str], Exemplar] = {}
    for path in directory.glob(PATTERN):
        for metric, of_metric in json.loads(path.read_text()).items():
            for bound, (trace_id, value, at) in of_metric.items():
                known = latest.get((metric, bound))
                if known is None or (known.timestamp or 0.0) < at:
                    latest[metric, bound] = Exemplar({"trace_id": trace_id}, value, at)
    for metric in metrics if latest else ():
        for i, sample in enumerate(metric.samples):
            bound = sample.labels.get("le")
            if bound is not None and (found := latest.get((metric.name, bound))) is not None:
                metric.samples[i] = sample._replace(exemplar=found)
