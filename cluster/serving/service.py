"""The inference service: runs prepared requests on a backend and turns their tokens into text.

Knows no network and no Ray. `prepare` is the way in, `grpc_server` adapts it to gRPC; the backend is a
balancer over attention replicas, or an engine of this process.
"""

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from cluster.engine.retry_hint import RetryHint
from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled, Unavailable
from cluster.serving.detokenizer import StreamDetokenizer, TokenBytes
from cluster.serving.prepare import Prompt, RequestPreparer
from cluster.serving.tokenizer import Tokenizer
from cluster.types import (
    CompletionOutput,
    EngineRequest,
    FinishReason,
    Logprobs,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """max_request_bytes: of one request on the wire.  max_streams_per_client: requests at a time; 0 for no bound."""

    max_request_bytes: int = 1 << 20
    max_streams_per_client: int = 0


@dataclass(slots=True)
class _Request:
    """One request's bookkeeping from arrival to its end."""

    request_id: str
    arrived_s: float
    timeout_s: float | None
    outcome: str | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    def timed_out(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"request {self.request_id} did not finish within its time budget of {self.timeout_s:g} s "
            f"({self.num_generated_tokens} tokens generated)"
        )


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
        self._preparer = RequestPreparer(tokenizer, info, defaults)
        self._backend = backend
        self._metrics = metrics
        self._clock = clock
        self._room = room
        self._spend = spend
        self._running: dict[str, str] = {}  # request id -> client
        self._by_client: Counter[str] = Counter()
        self._retry_hint = RetryHint(clock())
        self._draining = False

    @property
    def num_running(self) -> int:
        """Requests that were let in and have not ended."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        if not self._draining:
            log.info("draining: %d requests are running", self.num_running)
        self._draining = True

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
    ) -> CompletionOutput:
        """Returns the whole answer. Raises ClusterError; cancelling the call cancels the sequence."""
        with self._track(request_id, timeout_s, client) as tracked:
            request = replace(await self._prepare_in_time(prompt, params, tracked), client=client)
            deltas = [delta async for delta in self._run(request, tracked)]
        return CompletionOutput(
            request_id=request.request_id,
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
            request = replace(await self._prepare_in_time(prompt, params, tracked), client=client)
            async with aclosing(self._run(request, tracked)) as deltas:
                async for delta in deltas:
                    yield delta

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str = "", timeout_s: float | None = None
    ) -> EngineRequest:
        """Returns the request as an engine takes it. Raises InvalidRequest: field, value and limit."""
        request_id = request_id or self.new_request_id()
        return await self._preparer.prepare(prompt, params, request_id=request_id, timeout_s=timeout_s)

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a text or a conversation. Raises InvalidRequest."""
        return await self._preparer.tokenize(prompt)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids. Raises InvalidRequest for one outside the vocabulary."""
        return await self._preparer.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    async def _prepare_in_time(self, prompt: Prompt, params: SamplingParams, tracked: _Request) -> EngineRequest:
        """Prepares within the time budget; the engine gets what is left of it."""
        preparing = self.prepare(prompt, params, request_id=tracked.request_id)
        request = await self._in_time(preparing, tracked)
        remaining_s = self._remaining_s(tracked)
        if remaining_s is not None and remaining_s <= 0:
            raise tracked.timed_out()
        tracked.num_prompt_tokens = len(request.prompt_token_ids)
        self._metrics.prompt_tokens(tracked.num_prompt_tokens)
        return replace(request, timeout_s=remaining_s)

    async def _run(self, request: EngineRequest, tracked: _Request) -> AsyncGenerator[TextDelta, None]:
        """Runs a prepared request; the last delta, and only it, has finish_reason and usage."""
        answer = Answer(self._tokenizer, request.params, self.info.eos_token_ids)
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
            raise ClusterError(f"request {tracked.request_id}: the engine ended it without a reason") from None
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
        """Counts a request from its arrival to its end, whatever the end, and logs the end."""
        tracked = _Request(request_id or self.new_request_id(), self._clock(), timeout_s)
        self._metrics.started()
        reason = ""
        try:
            with self._admitted(tracked, client):
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
            refused = outcome == Overloaded.grpc_code.lower()
            log.log(
                logging.DEBUG if refused else logging.INFO,  # hundreds a second, which the metrics count
                "request %r ended with %s after %.3f s, %d prompt tokens, %d generated%s",
                tracked.request_id[:MAX_REQUEST_ID_CHARS], outcome, elapsed_s,
                tracked.num_prompt_tokens, tracked.num_generated_tokens, reason,
                extra={"request_id": tracked.request_id[:MAX_REQUEST_ID_CHARS]},
            )  # fmt: skip

    @contextmanager
    def _admitted(self, tracked: _Request, client: str) -> Iterator[None]:
        """Refuses what cannot be let in, and holds a place in `_running`."""
        request_id, timeout_s = tracked.request_id, tracked.timeout_s
        if self._draining:
            raise Unavailable("this server is shutting down, send the request to another one")
        _check_request_id(request_id)
        if request_id in self._running:
            raise InvalidRequest(f"request_id {request_id!r} is that of a running request", "request_id")
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise InvalidRequest(f"timeout_ms is {timeout_s * 1000:g}, it must be above 0", "timeout_ms")
        limit = self.limits.max_streams_per_client
        if limit and self._by_client[client] >= limit:
            later_s = self._retry_hint.seconds(limit)
            raise Overloaded(
                f"this client has {limit} requests running, as many as it may: try again in {later_s:.1f} s", later_s
            )
        if len(self._running) >= self._room() and not self._is_modest(client):
            later_s = self._retry_hint.seconds(len(self._running))
            raise Overloaded(f"all attention replicas are full: try again in {later_s:.1f} s", later_s)
        self._running[request_id] = client
        self._by_client[client] += 1
        try:
            yield
        finally:
            del self._running[request_id]
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
            self._retry_hint.ended(self._clock())

    def _is_modest(self, client: str) -> bool:
        """Whether a full server should hear this client: another one has two more running; an engine then chooses."""
        return self._by_client[client] + 2 <= max(self._by_client.values(), default=0)


class Answer:
    """Turns one sequence's updates into deltas of text, and finds its end."""

    def __init__(self, tokenizer: TokenBytes, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self._detokenizer = StreamDetokenizer(tokenizer, stop=tuple(params.stop), min_tokens=params.min_tokens)
        self._end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)

    def add(self, update: SequenceUpdate) -> TextDelta:
        """Returns what an update adds; finish_reason is set at the end. Raises the update's error."""
        if update.error is not None:
            raise update.error
        if update.finish_reason == "cancelled":
            raise RequestCancelled(f"request {update.request_id} was cancelled by the server")
        if update.finish_reason == "error":
            raise ClusterError(f"request {update.request_id}: the engine reported an error without saying which")
        text_ids, end_ids = self._split(update)
        num_before = self._detokenizer.num_tokens
        text = self._detokenizer.push(text_ids)
        finish_reason: FinishReason | None = update.finish_reason
        if finish_reason is not None:
            text += self._detokenizer.flush()
        num_kept = self._detokenizer.num_tokens - num_before
        if self._detokenizer.stopped is not None:
            finish_reason = "stop"
        else:
            num_kept += len(end_ids)
        logprobs: tuple[Logprobs, ...] = update.logprobs[:num_kept]
        return TextDelta(
            text=text, token_ids=update.token_ids[:num_kept], logprobs=logprobs, finish_reason=finish_reason
        )

    def _split(self, update: SequenceUpdate) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits off the token that ended the sequence (EOS or a stop token): it has no place in the text."""
        token_ids = update.token_ids
        if update.finish_reason == "stop" and token_ids and token_ids[-1] in self._end_ids:
            return token_ids[:-1], token_ids[-1:]
        return token_ids, ()


def _check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed",
            "request_id",
        )
    if not all("!" <= char <= "~" for char in request_id):
        raise InvalidRequest(
            f"request_id is {request_id!r}, printable ASCII characters without spaces are needed",
            "request_id",
        )
