"""Makes spans and sends them over OTLP, from a thread of its own. Loads OpenTelemetry.

Nobody waits for the receiver: ended spans go into a queue of bounded size, whose oldest is dropped where it is full.
Lines of the log count those that are lost.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_SCHEDULE_DELAY
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer
from opentelemetry.util.types import AttributeValue

from cluster.errors import ClusterError, SetupError
from cluster.logs import SELDOM_S, SeldomLog
from cluster.tracing.contexts import Place
from cluster.tracing.settings import GRPC, HTTP, TracingSettings
from cluster.version import __version__

log = logging.getLogger(__name__)
seldom = SeldomLog(log)

SERVICE = "moe-cluster"
PREFIX = "moecluster."  # of the attributes that no convention names
DELAY_MS = 1000.0  # between two exports, where OTEL_BSP_SCHEDULE_DELAY does not say: a process that dies loses so much
FAREWELL_S = 1.0  # for what is left at a process's end
_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Spans:
    """One process's spans. All methods may be called from any thread. way: to the receiver, if there is one."""

    def __init__(self, provider: TracerProvider, way: "Way | None" = None) -> None:
        self._provider, self._way = provider, way
        self.tracer: Tracer = provider.get_tracer(SERVICE, __version__)

    def begin(
        self,
        name: str,
        parent: Place | Span,
        at_ns: int | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        **attributes: Any,
    ) -> Span:
        """A span under a recorded one. at_ns: wall clock, now by default.  attributes: ours, by their short names."""
        over = parent if isinstance(parent, Span) else _remote(parent)
        return self.tracer.start_span(name, trace.set_span_in_context(over), kind, ours(attributes), start_time=at_ns)

    def work(self, name: str, parent: Place, began_ns: int, ended_ns: int, **attributes: Any) -> None:
        """A span of what was done for another process, from its begin to its end."""
        self.begin(name, parent, began_ns, kind=SpanKind.SERVER, **attributes).end(ended_ns)

    def flush(self) -> None:
        """Sends what is left. Blocks for FAREWELL_S at most, not at all for a receiver that was down a moment ago."""
        sending = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        sending.start()
        if self._way is None or not self._way.is_down:
            sending.join(FAREWELL_S)

    def close(self) -> None:
        """Sends what is left, and ends the thread that does. Does not block; no span may end here any more."""
        threading.Thread(target=self._provider.shutdown, name="traces", daemon=True).start()


class Way(SpanExporter):
    """To a receiver. is_down: the last that was sent did not arrive."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self.is_down, self.num_lost = exporter, False, 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self.is_down = result is not SpanExportResult.SUCCESS
        if self.is_down:
            self.num_lost += len(spans)
            seldom.warning("spans do not reach the receiver of traces: %d are lost up to now", self.num_lost)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def open_spans(settings: TracingSettings, role: str, **attributes: str) -> Spans:
    """For this process. role: of it in the cluster.  attributes: what tells it from its like. Raises SetupError."""
    provider = TracerProvider(
        # None: what OTEL_TRACES_SAMPLER asks for, else each trace that a client does not leave out.
        None if settings.ratio is None else ParentBasedTraceIdRatio(settings.ratio),
        _resource(role, attributes),
        shutdown_on_exit=False,
    )
    delay_ms = None if os.environ.get(OTEL_BSP_SCHEDULE_DELAY) else DELAY_MS
    for sdk in map(logging.getLogger, _LOGGERS):
        if not any(isinstance(each, _Seldom) for each in sdk.filters):
            sdk.filters.insert(0, _Seldom())  # OpenTelemetry's own leaves lines out and does not count them
    way = Way(exporter(settings))
    provider.add_span_processor(BatchSpanProcessor(way, schedule_delay_millis=delay_ms))
    return Spans(provider, way)


def exporter(settings: TracingSettings) -> SpanExporter:
    """Reads the rest (headers, certificates, time limits) from the standard variables. Raises SetupError."""
    protocol, endpoint = settings.protocol, settings.endpoint
    if protocol == "auto":
        protocol = next((given for name in _PROTOCOLS if (given := os.environ.get(name))), GRPC)
    if protocol == GRPC:
        return GrpcExporter(endpoint=endpoint or None)
    if protocol != HTTP:
        raise SetupError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, {GRPC} or {HTTP} is needed")
    if endpoint and not urlsplit(endpoint).path.strip("/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return HttpExporter(endpoint=endpoint or None)


def ours(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that no convention names, from their short names."""
    return {PREFIX + name: value for name, value in attributes.items()}


def code_of(error: BaseException) -> str:
    """Of gRPC's codes, by which every front and every process names an error in its spans."""
    return error.grpc_code if isinstance(error, ClusterError) else "INTERNAL"


def mark_failed(span: Span, code: str) -> None:
    """code: of `code_of`."""
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))


def place(span: Span) -> Place:
    context = span.get_span_context()
    return Place(context.trace_id, context.span_id)


class _Seldom(logging.Filter):
    """Of each kind of line one in a minute, with how many it stands for: a receiver that is down must fill no disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[float, int]] = {}  # by kind: when it was written, and how often not since

    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = time.monotonic(), str(record.msg)
        written, left_out = self._last.get(kind, (-SELDOM_S, 0))
        if now - written < SELDOM_S:
            self._last[kind] = written, left_out + 1
            return False
        self._last[kind] = now, 0
        if left_out:
            record.msg = f"{kind} (and {left_out} more in the {now - written:.0f} s before)"
        return True


def _resource(role: str, attributes: Mapping[str, str]) -> Resource:
    """The service's name is that of OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES, where one of these has it."""
    process: dict[str, AttributeValue] = {
        "service.version": __version__,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    made = Resource.create(process | ours({"role": role, **attributes}))
    has_name = not str(made.attributes["service.name"]).startswith("unknown_service")
    return made if has_name else made.merge(Resource({"service.name": SERVICE}))


def _remote(place: Place) -> Span:
    return NonRecordingSpan(SpanContext(*place, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)))
