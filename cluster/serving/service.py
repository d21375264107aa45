"""The inference service: runs prepared requests on a backend and turns their tokens into text.

Knows no network and no Ray. A front (`grpc/`) asks `admission` about a call, then calls the service; `prepare` makes an
engine's request of a prompt, `tracking` follows it to its end.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.config import DEFAULTS
from cluster.errors import ClusterError, NotFound, Unavailable
from cluster.outcome import Computed, Numbers, Wants
from cluster.serving.admission.admission import Admission
from cluster.serving.backend import GenerationBackend, UpdateStream
from cluster.serving.model_names import MAX_SHOWN
from cluster.serving.outcomes import result_of
from cluster.serving.prepare import RequestPreparer
from cluster.serving.text.answer import Answer
from cluster.serving.text.detokenizer import NoText
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.text.work import NoTextWork, TextWork
from cluster.serving.tracking import RequestMetrics, RequestTracker, TrackedRequest
from cluster.structured import FIELD
from cluster.types import CompletionOutput, EngineRequest, ModelInfo, SamplingParams, SequenceUpdate, TextDelta

if TYPE_CHECKING:  # OpenTelemetry, where traces are asked for
    from cluster.tracing.requests import RequestTracing


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """max_request_bytes: of one request on the wire.
    max_waiting_inputs: medium and large inputs, each, that may wait to be tokenized.
    """

    max_request_bytes: int = DEFAULTS["max_request_bytes"]
    max_waiting_inputs: int = DEFAULTS["max_waiting_inputs"]


class InferenceService:
    """One model's service. Not thread-safe: call it from one event loop.

    tokenizer: None serves token ids alone.  defaults: the checkpoint's generation_config; None fields take
    `SAMPLING_DEFAULTS`.
    admission: lets calls in; by default any.  clock: monotonic seconds.
    adapters: returns the names of the LoRA adapters that are loaded now.  spans: None where nothing is traced.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        info: ModelInfo,
        defaults: SamplingParams,
        backend: GenerationBackend,
        metrics: RequestMetrics,
        limits: ServiceLimits | None = None,
        admission: Admission | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_request_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        adapters: Callable[[], Collection[str]] = tuple,
        spans: "RequestTracing | None" = None,
    ) -> None:
        self.info = info
        self.limits = limits or ServiceLimits()
        self.admission = admission or Admission(clock=clock)
        self._tokenizer = tokenizer or NoText()
        work = NoTextWork() if tokenizer is None else TextWork(tokenizer, self.limits.max_waiting_inputs)
        self._work = work
        self._preparer = RequestPreparer(work, info, defaults)
        self._backend = backend
        self.new_request_id = new_request_id
        self.adapters = adapters
        self.now_s = clock
        self.spans, self._tracker = spans, RequestTracker(metrics, clock, spans)

    async def start(self) -> None:
        """Starts what the first requests would wait for otherwise."""
        await self._work.start()

    @property
    def has_text(self) -> bool:
        """Whether tokens have a text here: not without a tokenizer."""
        return not isinstance(self._tokenizer, NoText)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token's text has, that of a special one, too; none without a tokenizer."""
        return self._tokenizer.token_bytes(token_id, skip_special_tokens=False)

    def tokenizer_info(self) -> dict[str, str | None]:
        """Returns the special tokens' texts by their names, and the text of the default chat template, if there is
        one. Raises NotFound without a tokenizer."""
        if isinstance(self._tokenizer, NoText):
            raise NotFound("this server has left out the tokenizer, and takes token ids alone", "request")
        return {**self._tokenizer.special_tokens, "chat_template": self._tokenizer.chat_template}

    def count_refused(self, error: ClusterError) -> None:
        """Counts a call that ended before it was a request: it was not let in, or its message could not be read. Does
        nothing where a request of the call ended with this error: that is counted."""
        self._tracker.refused(error)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
        check: Callable[[SamplingParams], None] = lambda params: None,
    ) -> CompletionOutput:
        """Returns the whole answer. Raises ClusterError; cancelling the call cancels the sequence.

        check: sees the parameters, with every default filled in, before anything is computed, and may refuse them.
        """
        with self._begun(request_id, timeout_s, client) as tracked:
            tracked.chat = prompt.chat is not None
            preparing = self.prepare(prompt, params, request_id=tracked.request_id, client=client)
            request = await self._in_time(preparing, tracked, client)
            check(request.params)
            deltas = [delta async for delta in self._run(request, tracked)]
        return CompletionOutput(
            request_id=tracked.name,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            text="".join(delta.text for delta in deltas),
            finish_reason=deltas[-1].finish_reason or "error",
            logprobs=tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
            cached_tokens=deltas[-1].cached_tokens,
        )

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
        prompt_group: str = "",
        accepted: bool = False,
        goes_on: bool = False,
    ) -> AsyncGenerator[TextDelta, None]:
        """Yields the answer piece by piece. Raises as `generate`; closing it cancels the sequence.

        prompt_group: as in EngineRequest.  accepted, goes_on: as in Admission.
        """
        with self._begun(request_id, timeout_s, client, accepted=accepted, goes_on=goes_on) as tracked:
            tracked.chat, tracked.stream = prompt.chat is not None, True
            preparing = self.prepare(prompt, params, request_id=tracked.request_id, client=client)
            request = replace(await self._in_time(preparing, tracked, client), prompt_group=prompt_group)
            async with aclosing(self._run(request, tracked)) as deltas:
                async for delta in deltas:
                    yield delta

    async def compute(
        self,
        prompt: Prompt,
        wants: Wants,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        client: str = "",
        check: Callable[[int], None] = lambda num_tokens: None,
        num_top: int = 0,
        goes_on: bool = False,
    ) -> Computed:
        """Returns a result of numbers. Raises as `generate`.

        check: sees the number of the prompt's tokens before anything is computed, and may refuse them.
        num_top: of the likeliest tokens at each position, beside "token_logprobs".  goes_on: as in Admission.
        """
        with self._begun(request_id, timeout_s, client, goes_on=goes_on) as tracked:
            self._check_adapter(prompt)
            preparing = self._preparer.result(
                prompt, wants, request_id=tracked.request_id, client=client, num_top=num_top
            )
            request = await self._in_time(preparing, tracked, client)
            check(len(request.prompt_token_ids))
            numbers = await self._numbers(request, tracked)
        return Computed(request_id=tracked.name, prompt_token_ids=request.prompt_token_ids, numbers=numbers)

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
        self._check_adapter(prompt)
        request_id = request_id or self.new_request_id()
        return await self._preparer.prepare(prompt, params, request_id=request_id, timeout_s=timeout_s, client=client)

    async def tokenize(self, prompt: Prompt, client: str = "") -> list[int]:
        """Returns the token ids of a text or a conversation. Raises InvalidRequest, Overloaded."""
        return await self._preparer.tokenize(prompt, client)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, client: str = "") -> str:
        """Returns the text of token ids. Raises InvalidRequest for one outside the vocabulary; Overloaded."""
        return await self._preparer.detokenize(token_ids, skip_special_tokens=skip_special_tokens, client=client)

    def _check_adapter(self, prompt: Prompt) -> None:
        """Raises NotFound."""
        if prompt.adapter and prompt.adapter not in (names := self.adapters()):
            known = ", ".join(sorted(names)[:MAX_SHOWN]) or "none"
            raise NotFound(f"the adapter {prompt.adapter[:100]!r} is not served here; served: {known}", "adapter")

    @contextmanager
    def _begun(
        self, request_id: str, timeout_s: float | None, client: str, **admitted: bool
    ) -> Iterator[TrackedRequest]:
        """Tracks a request that admission lets begin, and charges its client with its tokens at its end."""
        with self._tracker.track(self.new_request_id(), request_id, timeout_s) as tracked:
            try:
                with self.admission.generation(client, **admitted):
                    yield tracked
            finally:
                self.admission.spend(client, tracked.num_tokens)

    async def _in_time(
        self, preparing: Awaitable[EngineRequest], tracked: TrackedRequest, client: str
    ) -> EngineRequest:
        """Prepares within the time budget; the engine gets what is left of it."""
        request = await self._tracker.in_time(preparing, tracked)
        remaining_s = self._tracker.remaining_s(tracked)
        if remaining_s is not None and remaining_s <= 0:
            raise tracked.timed_out()
        request = self._tracker.prepared(tracked, request)
        return replace(request, timeout_s=remaining_s, client=client, name=tracked.name)

    async def _run(self, request: EngineRequest, tracked: TrackedRequest) -> AsyncGenerator[TextDelta, None]:
        """Runs a prepared request; the last delta, and only it, has finish_reason and usage."""
        answer = Answer(self._tokenizer, request.params, self.info.eos_token_ids, tracked.name)
        before = await answer.go_on(request.output_token_ids)
        if answer.matched_stop is not None:  # engines know no stop strings
            num_tokens = tracked.num_prompt_tokens
            delta = TextDelta(finish_reason="stop", matched_stop=answer.matched_stop, prompt_tokens=num_tokens)
        else:
            updates = self._backend.generate(request)
            try:
                while (delta := await self._next_delta(updates, answer, tracked, request)).finish_reason is None:
                    if delta.token_ids:
                        yield replace(delta, text_before=before) if before else delta
                        before = ""
            finally:
                await updates.aclose()  # before the last delta goes out: a stop string ends the sequence here
        self._tracker.answered(tracked, delta.finish_reason or "error")
        yield replace(delta, usage=tracked.usage, text_before=before)

    async def _next_delta(
        self, updates: UpdateStream, answer: Answer, tracked: TrackedRequest, request: EngineRequest
    ) -> TextDelta:
        update = await self._next_update(updates, tracked)
        if request.constraint is not None and update.token_ids and not update.constrained:
            raise _older(tracked, FIELD)
        if request.adapter != update.adapter and update.token_ids:
            raise _older(tracked, "adapter")
        delta = answer.add(update)
        if update.token_ids:
            self._tracker.cached(tracked, update.cached_tokens)
        self._tracker.tokens(tracked, len(delta.token_ids))
        return replace(delta, prompt_tokens=tracked.num_prompt_tokens, cached_tokens=tracked.num_cached_tokens or 0)

    async def _next_update(self, updates: UpdateStream, tracked: TrackedRequest) -> SequenceUpdate:
        try:
            return await self._tracker.in_time(updates.__anext__(), tracked)
        except StopAsyncIteration:
            raise ClusterError(f"request {tracked.name}: the engine ended it without a reason") from None

    async def _numbers(self, request: EngineRequest, tracked: TrackedRequest) -> Numbers:
        """Runs a prepared request to its result of numbers."""
        updates = self._backend.generate(request)
        try:
            while (numbers := result_of(update := await self._next_update(updates, tracked), tracked.name)) is None:
                pass  # an update without news
            if request.adapter != update.adapter:
                raise _older(tracked, "adapter")
        finally:
            await updates.aclose()
        self._tracker.computed(tracked, request.wants)
        return numbers


def _older(tracked: TrackedRequest, field: str) -> Unavailable:
    return Unavailable(
        f"request {tracked.name}: its attention replica is of an older version, which knows no {field}: send it again "
        "when `moe-cluster roll` is through"
    )
