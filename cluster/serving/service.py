"""The inference service: runs prepared requests on a backend and turns their tokens into text.

Knows no network and no Ray. `prepare` is the way in, `grpc/` adapts it to gRPC; the backend is a
balancer over attention replicas, or an engine of this process.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled
from cluster.serving.admission.places import Admission, ServiceLimits
from cluster.serving.grpc.answer_size import check_before
from cluster.serving.prepare import Prompt, RequestPreparer
from cluster.serving.text.answer import Answer
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.text.work import TextWork
from cluster.types import (
    CompletionOutput,
    EngineRequest,
    ModelInfo,
    SamplingParams,
    SequenceUpdate,
    TextDelta,
    Usage,
)

log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128

T = TypeVar("T")


class UpdateStream(Protocol):
    """One sequence's updates; an async generator is one. `aclose` cancels the sequence if it still runs."""

    def __aiter__(self) -> AsyncIterator[SequenceUpdate]: ...

    def __anext__(self) -> Awaitable[SequenceUpdate]: ...

    def aclose(self) -> Awaitable[None]: ...


class GenerationBackend(Protocol):
    """What runs a request. The last update has a finish_reason; `error` stands in it when that is "error"."""

    def generate(self, request: EngineRequest) -> UpdateStream: ...


class RequestMetrics(Protocol):
    """What the ingress counts. Each `started` is followed by one `finished`."""

    def started(self) -> None: ...

    def finished(self, outcome: str) -> None:
        """outcome: "stop", "length", "cancelled", or the gRPC code's name of an error in lower case."""

    def first_token(self, seconds: float) -> None:
        """seconds: from the request's arrival."""

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """seconds: since the delta before, for the `num_tokens` of this one."""

    def end_to_end(self, seconds: float) -> None:
        """seconds: from arrival to the last token, of requests that were answered."""

    def prompt_tokens(self, count: int, /) -> None: ...

    def generated_tokens(self, count: int, /) -> None: ...


@dataclass(slots=True)
class _Request:
    """One request's bookkeeping from arrival to its end.

    request_id: of it alone, among the requests of all ingresses.  name: what its client calls it.
    """

    request_id: str
    name: str
    arrived_s: float
    timeout_s: float | None
    outcome: str | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    def timed_out(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"request {self.name} did not finish within its time budget of {self.timeout_s:g} s "
            f"({self.num_generated_tokens} tokens generated)"
        )


# A line for each request, where it is asked for (`log_requests`); for those that failed by our fault in any case.
request_log = logging.getLogger("cluster.requests")
_LOG_LEVELS = {"internal": logging.WARNING, "unavailable": logging.WARNING}


class InferenceService:
    """One model's service. Not thread-safe: call it from one event loop.

    defaults: the checkpoint's generation_config; None fields take `SAMPLING_DEFAULTS`.
    room: how many requests the backend has place for; beyond it they are refused before anything is done for them.
    spend: told each request's client and tokens, prompt and answer together, when it has ended.
    clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        info: ModelInfo,
        defaults: SamplingParams,
        backend: GenerationBackend,
        metrics: RequestMetrics,
        limits: ServiceLimits | None = None,
        room: Callable[[], float] = lambda: math.inf,
        spend: Callable[[str, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_request_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.info = info
        self.limits = limits or ServiceLimits()
        self.new_request_id = new_request_id
        self._tokenizer = tokenizer
        work = TextWork(tokenizer, self.limits.max_waiting_inputs)
        self._preparer = RequestPreparer(work, info, defaults)
        self._backend = backend
        self._metrics = metrics
        self._clock = clock
        self._spend = spend
        self._admission = Admission(self.limits, room, clock)

    @property
    def num_running(self) -> int:
        """Requests that were let in and have not ended."""
        return self._admission.num_running

    @property
    def draining(self) -> bool:
        return self._admission.draining

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        self._admission.drain()

    def count_refused(self, error: ClusterError) -> None:
        """Counts a call that ended before it was read: its caller may not make it."""
        self._metrics.started()
        self._metrics.finished(error.grpc_code.lower())
        log.debug("a call was refused: %s", error)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
        max_bytes: int | None = None,
    ) -> CompletionOutput:
        """Returns the whole answer. Raises ClusterError; cancelling the call cancels the sequence.

        max_bytes: of the answer on the wire; one that may have more is refused.
        """
        with self._track(request_id, timeout_s, client) as tracked:
            request = await self._prepare_in_time(prompt, params, tracked, client)
            if max_bytes is not None:
                check_before(request.params, max_bytes)
            deltas = [delta async for delta in self._run(request, tracked)]
        return CompletionOutput(
            request_id=tracked.name,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            text="".join(delta.text for delta in deltas),
            finish_reason=deltas[-1].finish_reason or "error",
            logprobs=tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
        )

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
    ) -> AsyncGenerator[TextDelta, None]:
        """Yields the answer piece by piece. Raises as `generate`; closing it cancels the sequence."""
        with self._track(request_id, timeout_s, client) as tracked:
            request = await self._prepare_in_time(prompt, params, tracked, client)
            async with aclosing(self._run(request, tracked)) as deltas:
                async for delta in deltas:
                    yield delta

    async def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
    ) -> EngineRequest:
        """Returns the request as an engine takes it. Raises InvalidRequest: field, value and limit; Overloaded."""
        request_id = request_id or self.new_request_id()
        return await self._preparer.prepare(prompt, params, request_id=request_id, timeout_s=timeout_s, client=client)

    async def tokenize(self, prompt: Prompt, client: str = "") -> list[int]:
        """Returns the token ids of a text or a conversation. Raises InvalidRequest, Overloaded."""
        return await self._preparer.tokenize(prompt, client)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, client: str = "") -> str:
        """Returns the text of token ids. Raises InvalidRequest for one outside the vocabulary; Overloaded."""
        return await self._preparer.detokenize(token_ids, skip_special_tokens=skip_special_tokens, client=client)

    async def _prepare_in_time(
        self, prompt: Prompt, params: SamplingParams, tracked: _Request, client: str
    ) -> EngineRequest:
        """Prepares within the time budget; the engine gets what is left of it."""
        preparing = self.prepare(prompt, params, request_id=tracked.request_id, client=client)
        request = await self._in_time(preparing, tracked)
        remaining_s = self._remaining_s(tracked)
        if remaining_s is not None and remaining_s <= 0:
            raise tracked.timed_out()
        tracked.num_prompt_tokens = len(request.prompt_token_ids)
        self._metrics.prompt_tokens(tracked.num_prompt_tokens)
        return replace(request, timeout_s=remaining_s, client=client, name=tracked.name)

    async def _run(self, request: EngineRequest, tracked: _Request) -> AsyncGenerator[TextDelta, None]:
        """Runs a prepared request; the last delta, and only it, has finish_reason and usage."""
        answer = Answer(self._tokenizer, request.params, self.info.eos_token_ids, tracked.name)
        updates = self._backend.generate(request)
        try:
            while (delta := await self._next_delta(updates, answer, tracked)).finish_reason is None:
                if delta.token_ids:
                    yield delta
        finally:
            await updates.aclose()  # before the last delta goes out: a stop string ends the sequence here
        tracked.outcome = delta.finish_reason
        self._metrics.end_to_end(self._clock() - tracked.arrived_s)
        yield replace(
            delta,
            usage=Usage(prompt_tokens=tracked.num_prompt_tokens, completion_tokens=tracked.num_generated_tokens),
        )

    async def _next_delta(self, updates: UpdateStream, answer: "Answer", tracked: _Request) -> TextDelta:
        try:
            update = await self._in_time(updates.__anext__(), tracked)
        except StopAsyncIteration:
            raise ClusterError(f"request {tracked.name}: the engine ended it without a reason") from None
        delta = answer.add(update)
        self._count_tokens(len(delta.token_ids), tracked)
        return delta

    def _count_tokens(self, count: int, tracked: _Request) -> None:
        if not count:
            return
        now_s = self._clock()
        if tracked.last_token_s is None:
            self._metrics.first_token(now_s - tracked.arrived_s)
        else:
            self._metrics.inter_token(now_s - tracked.last_token_s, count)
        tracked.last_token_s = now_s
        tracked.num_generated_tokens += count
        self._metrics.generated_tokens(count)

    def _remaining_s(self, tracked: _Request) -> float | None:
        if tracked.timeout_s is None:
            return None
        return tracked.arrived_s + tracked.timeout_s - self._clock()

    async def _in_time(self, step: Awaitable[T], tracked: _Request) -> T:
        """Awaits one step within the request's time budget. Raises DeadlineExceeded."""
        remaining_s = self._remaining_s(tracked)
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

    @contextmanager
    def _track(self, request_id: str, timeout_s: float | None, client: str) -> Iterator[_Request]:
        """Counts a request from its arrival to its end, whatever the end, and logs the end.

        request_id: its client's. Clients choose it, and two may choose the same: nothing is found by it.
        """
        unique = self.new_request_id()
        tracked = _Request(unique, request_id or unique, self._clock(), timeout_s)
        self._metrics.started()
        reason = ""
        try:
            _check(tracked)
            with self._admission.admitted(client):
                yield tracked
        except (asyncio.CancelledError, GeneratorExit, RequestCancelled):
            # Closed after its last delta, a request has its outcome already.
            tracked.outcome = tracked.outcome or "cancelled"
            raise
        except ClusterError as error:
            tracked.outcome = error.grpc_code.lower()
            reason = f": {error}"
            raise
        finally:
            outcome = tracked.outcome or "internal"
            elapsed_s = self._clock() - tracked.arrived_s
            self._metrics.finished(outcome)
            if self._spend is not None:
                self._spend(client, tracked.num_prompt_tokens + tracked.num_generated_tokens)
            level = _LOG_LEVELS.get(outcome, logging.INFO)
            if outcome == Overloaded.grpc_code.lower() and not tracked.num_generated_tokens:
                level = logging.DEBUG  # refused ones are hundreds a second, which the metrics count
            request_log.log(
                level,
                "request %r ended with %s after %.3f s, %d prompt tokens, %d generated%s",
                tracked.name[:MAX_REQUEST_ID_CHARS], outcome, elapsed_s,
                tracked.num_prompt_tokens, tracked.num_generated_tokens, reason,
                extra={"request_id": tracked.name[:MAX_REQUEST_ID_CHARS]},
            )  # fmt: skip


def _check(tracked: _Request) -> None:
    """Raises InvalidRequest for what a client may not call a request, and for a time that cannot be."""
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
