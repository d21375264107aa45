"""An attention replica's span of each request: from when it gets it to when its ingress has all of the answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.tracing.contexts import place_of
from cluster.tracing.spans import Spans, place
from cluster.types import EngineRequest


class ReplicaTracing:
    """Of one attention replica."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def flush(self) -> None:
        """As of `Spans`."""
        self._spans.flush()

    @contextmanager
    def request(self, request: EngineRequest) -> Iterator[EngineRequest]:
        """Yields the request with its place under a span, which lasts as long; as it is where it is not traced."""
        parent = place_of(request.trace)
        if parent is None:
            yield request
            return
        span = self._spans.begin("attention replica", parent, replays=request.num_replays)
        try:
            yield replace(request, trace=place(span).traceparent)
        finally:
            span.end()
