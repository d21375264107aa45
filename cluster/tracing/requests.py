"""An ingress's spans: of a call, and of each request in it, by OpenTelemetry's conventions for generative AI.

Source: open-telemetry/semantic-conventions-genai v0.1.0, docs/gen-ai/client-inference.md. Nothing that a client or the
model wrote is in them: no prompt, no answer, no stop string.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.errors import DeadlineExceeded, Unavailable, Unserved
from cluster.outcome import CALLS
from cluster.tracing.spans import Spans, code_of, mark_failed, ours, place
from cluster.types import EngineRequest, SamplingParams

PROVIDER = "moe-cluster"
_OPERATIONS = {"tokens": "text_completion", "last_hidden_state": "embeddings", "mean_hidden_state": "embeddings"}
_PARAMS = ("temperature", "top_p", "top_k", "max_tokens", "seed", "frequency_penalty", "presence_penalty")
# Of gRPC's codes, those that are a server's errors by OpenTelemetry's conventions.
_OUR_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
_OF_HTTP = {error.http_status: error.grpc_code for error in (Unserved, Unavailable, DeadlineExceeded)}
_ANSWERED = ("stop", "length")


class _Call(NamedTuple):
    """context: of the call's span.  chat: whether a conversation was sent, which may come on as token ids."""

    context: Context
    chat: bool


_around: ContextVar[_Call | None] = ContextVar("the call of this task", default=None)


class RequestTracing:
    """One ingress's. For one event loop: each call is in a task of its own."""

    def __init__(self, spans: Spans, model_id: str) -> None:
        self._spans, self._model_id = spans, model_id
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def call(
        self, name: str, headers: Mapping[str, str], *, chat: bool = False, **attributes: Any
    ) -> Iterator["CallSpan"]:
        """A call while it is open, under the span that its `traceparent` names; its requests come under it.

        headers: by their names in lower case.  chat: a conversation was sent, even if a request has its token ids.
        attributes: of a convention, "__" for each "."."""
        named = {key.replace("__", "."): value for key, value in attributes.items()}
        above = self._propagator.extract(headers, Context())
        span = self._spans.tracer.start_span(name, above, SpanKind.SERVER, named)
        # Left there: an async generator may end in another context, and each call has its own.
        _around.set(_Call(trace.set_span_in_context(span, Context()), chat))
        try:
            yield CallSpan(span)
        except Exception as error:
            CallSpan(span).failed(code_of(error))
            raise
        finally:
            span.end()

    def request(self, request_id: str) -> "RequestSpan | None":
        """A request that begins; None for one that is not recorded."""
        call = _around.get()
        span = self._spans.tracer.start_span("request", Context() if call is None else call.context)
        if not span.is_recording():
            return None
        return RequestSpan(span, request_id, self._model_id, chat=call is not None and call.chat)

    def flush(self) -> None:
        """As `Spans.flush`."""
        self._spans.flush()


class CallSpan:
    """One call's span."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def failed(self, code: str) -> None:
        """code: of `code_of`. A client's fault is no error of a server, by the conventions."""
        if code in _OUR_FAULTS:
            mark_failed(self._span, code)

    def by_http(self, name: str, route: str, status: int) -> None:
        """name: with the route of the function that answered, "" for none.  status: 0 where none was sent."""
        if route:
            self._span.update_name(name)
            self._span.set_attribute("http.route", route)
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.failed(_OF_HTTP.get(status, "INTERNAL"))

    def by_grpc(self, code: str) -> None:
        """code: of `code_of`, or "OK"."""
        self._span.set_attribute("rpc.response.status_code", code)


class RequestSpan:
    """One request's span."""

    def __init__(self, span: Span, request_id: str, model_id: str, *, chat: bool) -> None:
        self._span, self._model_id, self._chat = span, model_id, chat
        span.set_attribute("gen_ai.provider.name", PROVIDER)
        span.set_attribute("gen_ai.response.id", request_id)

    @property
    def trace_id(self) -> str:
        """As it is written."""
        return f"{place(self._span).trace_id:032x}"

    @property
    def traceparent(self) -> str:
        return place(self._span).traceparent

    def prepared(self, request: EngineRequest, *, chat: bool, stream: bool) -> None:
        """It is tokenized, and its parameters have their defaults."""
        operation = "chat" if chat or self._chat else _OPERATIONS.get(request.wants) or CALLS[request.wants].lower()
        model = request.adapter or self._model_id
        self._span.update_name(f"{operation} {model}")
        self._span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "gen_ai.request.stream": stream,
            }
        )
        if request.wants == "tokens":
            is_json = request.constraint is not None and request.constraint[0] == "json"
            self._span.set_attribute("gen_ai.output.type", "json" if is_json else "text")
            self._span.set_attributes(_given(request.params))
        self._span.add_event("prepared")

    def first_token(self, seconds: float) -> None:
        """seconds: since it began."""
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        self._span.add_event("first token")

    def end(self, outcome: str, num_generated_tokens: int, num_cached_tokens: int | None) -> None:
        """outcome: as `RequestMetrics.finished` gets it.  num_cached_tokens: None where it is not known."""
        if num_cached_tokens is not None:
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", num_cached_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", num_generated_tokens)
        self._span.set_attributes(ours({"outcome": outcome}))
        if outcome in _ANSWERED:
            self._span.set_attribute("gen_ai.response.finish_reasons", [outcome])
        elif outcome != "cancelled":
            mark_failed(self._span, outcome.upper())
        self._span.end()


def _given(params: SamplingParams) -> dict[str, Any]:
    values = {name: getattr(params, name) for name in _PARAMS}
    values["top_k"] = params.top_k or None  # 0 keeps all
    return {f"gen_ai.request.{name}": value for name, value in values.items() if value is not None}
