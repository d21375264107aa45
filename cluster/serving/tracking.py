"""One request from its arrival to its end: its time budget, its metrics, its span, its log line.

Counts a prompt's tokens and reads nothing of them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled
from cluster.outcome import CALLS, Wants
from cluster.types import EngineRequest, Usage

if TYPE_CHECKING:  # OpenTelemetry, where traces are asked for
    from cluster.tracing.requests import RequestSpan, RequestTracing

log = logging.getLogger(__name__)
# A line for each request where `log_requests` asks for it; for those that failed by our fault in any case.
request_log = logging.getLogger("cluster.requests")

MAX_REQUEST_ID_CHARS = 128
_LOG_LEVELS = {"internal": logging.WARNING, "unavailable": logging.WARNING}
_COUNTED = "counted_as_a_request"  # of errors; set here alone

T = TypeVar("T")


Example = Literal["first_token", "end_to_end"]


class RequestMetrics(Protocol):
    """The ingress's counters. Each `started` is followed by one `finished`."""

    def started(self) -> None: ...

    def finished(self, outcome: str) -> None:
        """outcome: "stop", "length", "cancelled", or the gRPC code's name of an error in lower case."""

    def first_token(self, seconds: float) -> None:
        """seconds: from the request's arrival."""

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """seconds: since the delta before, for the `num_tokens` of this one."""

    def end_to_end(self, seconds: float) -> None:
        """seconds: from arrival to the last token, of requests that were answered."""

    def example(self, of: Example, seconds: float, trace_id: str) -> None:
        """A request that is traced had this one of the times above."""

    def result(self, method: str) -> None:
        """method: the rpc that was answered with numbers."""

    def prompt_tokens(self, count: int, /) -> None: ...

    def generated_tokens(self, count: int, /) -> None: ...


@dataclass(slots=True)
class TrackedRequest:
    """request_id: unique among the requests of all ingresses.  name: the client's name for it.
    chat, stream: how it was asked.  span: None where it is not traced."""

    request_id: str
    name: str
    arrived_s: float
    timeout_s: float | None
    outcome: str | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_continued_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int | None = None
    chat: bool = False
    stream: bool = False
    span: "RequestSpan | None" = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_continued_tokens + self.num_generated_tokens

    @property
    def usage(self) -> Usage:
        """Of the whole answer."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_continued_tokens + self.num_generated_tokens,
            cached_tokens=self.num_cached_tokens or 0,
        )

    def timed_out(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"request {self.name} did not finish within its time budget of {self.timeout_s:g} s "
            f"({self.num_generated_tokens} tokens generated)"
        )


class RequestTracker:
    """Not thread-safe. clock: monotonic seconds.  spans: None where nothing is traced."""

    def __init__(
        self, metrics: RequestMetrics, clock: Callable[[], float], spans: "RequestTracing | None" = None
    ) -> None:
        self._metrics, self._clock, self._spans = metrics, clock, spans

    @contextmanager
    def track(self, request_id: str, name: str, timeout_s: float | None) -> Iterator[TrackedRequest]:
        """Counts a request while it is open, and logs its end. Raises InvalidRequest.

        request_id: unique.  name: the client's, or "". Two clients may choose the same, so nothing is found by it.
        """
        tracked = TrackedRequest(request_id, name or request_id, self._clock(), timeout_s)
        if self._spans is not None:
            tracked.span = self._spans.request(request_id)
        self._metrics.started()
        reason = ""
        try:
            _check(tracked)
            yield tracked
        except (asyncio.CancelledError, GeneratorExit, RequestCancelled) as error:
            vars(error)[_COUNTED] = True
            # A request that is closed after its last delta has its outcome already.
            tracked.outcome = tracked.outcome or "cancelled"
            raise
        except Exception as error:
            vars(error)[_COUNTED] = True
            if isinstance(error, ClusterError):
                tracked.outcome = error.grpc_code.lower()
                reason = f": {error}"
            raise
        finally:
            outcome = tracked.outcome or "internal"
            self._metrics.finished(outcome)
            if tracked.span is not None:
                tracked.span.end(outcome, tracked.num_generated_tokens, tracked.num_cached_tokens)
            self._log_end(tracked, outcome, reason)

    def refused(self, error: ClusterError) -> None:
        """Counts a call that ended before it was a request; nothing where a request ended with this error."""
        if _COUNTED in vars(error):
            return
        self._metrics.started()
        self._metrics.finished(error.grpc_code.lower())
        log.debug("a call was refused: %s", error)

    def prepared(self, tracked: TrackedRequest, request: EngineRequest) -> EngineRequest:
        """Counts the prompt's tokens, and those behind it that the client has. Returns the request with its place in a
        trace, if it is traced."""
        tracked.num_prompt_tokens = len(request.prompt_token_ids)
        tracked.num_continued_tokens = len(request.output_token_ids)
        self._metrics.prompt_tokens(tracked.num_tokens)
        if tracked.span is None:
            return request
        tracked.span.prepared(request, chat=tracked.chat, stream=tracked.stream)
        return replace(request, trace=tracked.span.traceparent)

    def cached(self, tracked: TrackedRequest, num_tokens: int) -> None:
        """Notes the tokens at the prompt's beginning that were in the cache where the first token comes from."""
        if tracked.num_cached_tokens is None:
            tracked.num_cached_tokens = min(num_tokens, tracked.num_prompt_tokens)

    def tokens(self, tracked: TrackedRequest, count: int) -> None:
        """Counts new tokens of the answer."""
        if not count:
            return
        now_s = self._clock()
        if tracked.last_token_s is None:
            self._metrics.first_token(now_s - tracked.arrived_s)
            if tracked.span is not None:
                tracked.span.first_token(now_s - tracked.arrived_s)
            self._note(tracked, "first_token", now_s)
        else:
            self._metrics.inter_token(now_s - tracked.last_token_s, count)
        tracked.last_token_s = now_s
        tracked.num_generated_tokens += count
        self._metrics.generated_tokens(count)

    def answered(self, tracked: TrackedRequest, outcome: str) -> None:
        """Counts the end of an answer."""
        tracked.outcome, now_s = outcome, self._clock()
        self._metrics.end_to_end(now_s - tracked.arrived_s)
        self._note(tracked, "end_to_end", now_s)

    def _note(self, tracked: TrackedRequest, of: Example, now_s: float) -> None:
        """For those who look for a trace behind a time."""
        if tracked.span is not None:
            self._metrics.example(of, now_s - tracked.arrived_s, tracked.span.trace_id)

    def computed(self, tracked: TrackedRequest, wants: Wants) -> None:
        """Counts the end of a result of numbers."""
        self._metrics.result(CALLS[wants])
        self.answered(tracked, "stop")

    def remaining_s(self, tracked: TrackedRequest) -> float | None:
        """Returns the rest of the time budget, None for no bound."""
        if tracked.timeout_s is None:
            return None
        return tracked.arrived_s + tracked.timeout_s - self._clock()

    async def in_time(self, step: Awaitable[T], tracked: TrackedRequest) -> T:
        """Awaits one step within the request's time budget. Raises DeadlineExceeded."""
        remaining_s = self.remaining_s(tracked)
        if remaining_s is None:
            return await step
        budget = asyncio.timeout(remaining_s)
        try:
            async with budget:
                return await step
        except TimeoutError:
            if budget.expired():
                raise tracked.timed_out() from None
            raise

    def _log_end(self, tracked: TrackedRequest, outcome: str, reason: str) -> None:
        level = _LOG_LEVELS.get(outcome, logging.INFO)
        if outcome == Overloaded.grpc_code.lower() and not tracked.num_generated_tokens:
            level = logging.DEBUG  # refused ones are hundreds a second, which the metrics count
        name = tracked.name[:MAX_REQUEST_ID_CHARS]
        request_log.log(
            level,
            "request %r ended with %s after %.3f s, %d prompt tokens, %d generated%s",
            name, outcome, self._clock() - tracked.arrived_s,
            tracked.num_prompt_tokens, tracked.num_generated_tokens, reason,
            extra={"request_id": name},
        )  # fmt: skip


def _check(tracked: TrackedRequest) -> None:
    """Raises InvalidRequest for a name that a request cannot have, and for a time budget that cannot be."""
    name, timeout_s = tracked.name, tracked.timeout_s
    if len(name) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id has {len(name)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed", "request_id"
        )
    if not all("!" <= char <= "~" for char in name):
        raise InvalidRequest(
            f"request_id is {name!r}, printable ASCII characters without spaces are needed", "request_id"
        )
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise InvalidRequest(f"timeout_ms is {timeout_s * 1000:g}, it must be above 0", "timeout_ms")
