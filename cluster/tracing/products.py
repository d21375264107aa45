"""A shard's work for steps that are traced: sums, and a span of each. Loads OpenTelemetry with the first step's end."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cluster.logs import SeldomLog
from cluster.tracing.contexts import unpack
from cluster.tracing.settings import TracingSettings

if TYPE_CHECKING:
    from cluster.tracing.spans import Spans

seldom = SeldomLog(logging.getLogger(__name__))

Product = tuple[int, float, float]  # rows, seconds that they waited, seconds that it took
OnTraced = Callable[[bytes, int, Sequence[Product]], None]
"""As `ShardTracing.computed`; called by any thread."""
QUIET_NS = 1_000_000_000  # a step of which nothing has come for so long has ended
MAX_STEPS = 1024  # under way; of further ones nothing is kept, and the log counts their products


@dataclass(slots=True)
class _Step:
    """Times: nanoseconds of the wall clock."""

    began: int
    ended: int
    products: int = 0
    rows: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0
    longest_s: float = 0.0


class ShardTracing:
    """Of one shard. All methods may be called from any thread; `send` alone makes spans."""

    def __init__(self, shard_id: int, clock: Callable[[], int] = time.time_ns) -> None:
        self._shard_id, self._clock = shard_id, clock
        self._settings: TracingSettings | None = None
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._steps: dict[bytes, _Step] = {}
        self._opened: tuple[TracingSettings, Spans] | None = None

    def follow(self, settings: TracingSettings | None) -> None:
        """Where spans go from now on."""
        with self._opening:
            self._settings = settings
            if self._opened is not None and self._opened[0] != settings:
                self._opened[1].close()
                self._opened = None

    def computed(self, packed: bytes, began: int, products: Sequence[Product]) -> None:
        """Products for the step of these spans (`contexts.pack`). began: on the wall clock, when the first of them did,
        or when the caller named the spans."""
        now = self._clock()
        with self._lock:
            step = self._steps.get(packed)
            if step is None:
                if len(self._steps) >= MAX_STEPS:
                    seldom.warning("a traced product is left out: %d steps are under way here", MAX_STEPS)
                    return
                step = self._steps[packed] = _Step(began, now)
            step.began, step.ended = min(step.began, began), now
            for rows, waited_s, computed_s in products:
                step.products += 1
                step.rows += rows
                step.waited_s += waited_s
                step.computed_s += computed_s
                step.longest_s = max(step.longest_s, computed_s)

    def send(self) -> None:
        """Makes spans of the steps that have ended. Call it now and then, from one thread."""
        if not self._steps:
            return
        now = self._clock()
        with self._lock:
            ended = {packed: step for packed, step in self._steps.items() if now - step.ended >= QUIET_NS}
            for packed in ended:
                del self._steps[packed]
        with self._opening:
            spans = self._open() if ended else None
            if spans is None:
                return
            for packed, step in ended.items():
                sums = asdict(step)
                began, ended_at = sums.pop("began"), sums.pop("ended")
                for place in unpack(packed):
                    spans.work(f"experts of shard {self._shard_id}", place, began, ended_at, **sums)

    def _open(self) -> "Spans | None":
        """None where nothing is to be traced. Raises SetupError."""
        if self._opened is None and self._settings is not None:
            from cluster.tracing.spans import open_spans

            self._opened = self._settings, open_spans(self._settings, "shard", shard_id=str(self._shard_id))
        return None if self._opened is None else self._opened[1]
