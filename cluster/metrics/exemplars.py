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
_DAMAGED = (OSError, ValueError, TypeError, AttributeError, RecursionError)  # of what is no file of ours


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


def add_exemplars(metrics: Iterable[Metric], directory: Path, damaged: Callable[[Path], None]) -> None:
    """To the buckets of histograms that have no labels of their own; the latest of all processes. damaged: hears of a
    file that cannot be read, which is left out."""
    latest: dict[tuple[str, str], tuple[float, Exemplar]] = {}  # when, by metric and bucket
    for path in directory.glob(PATTERN):
        try:
            exemplars = _read(path)
        except FileNotFoundError:  # its process has just ended
            continue
        except _DAMAGED:
            damaged(path)
            continue
        for key, at, exemplar in exemplars:
            if key not in latest or latest[key][0] < at:
                latest[key] = at, exemplar
    for metric in metrics if latest else ():
        for i, sample in enumerate(metric.samples):
            bound = sample.labels.get("le")
            if bound is not None and (found := latest.get((metric.name, bound))) is not None:
                metric.samples[i] = sample._replace(exemplar=found[1])


def _read(path: Path) -> list[tuple[tuple[str, str], float, Exemplar]]:
    """Each one's metric and bucket, and when it was noted. Raises one of _DAMAGED."""
    return [
        ((metric, bound), float(at), Exemplar({"trace_id": f"{int(trace_id, 16):032x}"[:32]}, float(value), float(at)))
        for metric, of_metric in json.loads(path.read_text()).items()
        for bound, (trace_id, value, at) in of_metric.items()
    ]
