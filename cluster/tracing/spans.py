"""Makes spans and sends them over OTLP, from a thread of its own. Loads OpenTelemetry.

Nobody waits for the receiver: ended spans go into a queue of bounded size, and are dropped where it is full.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_SCHEDULE_DELAY
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, Tracer
from opentelemetry.util.types import AttributeValue

from cluster.errors import SetupError
from cluster.logs import SELDOM_S
from cluster.tracing.contexts import Place
from cluster.tracing.settings import GRPC, HTTP, TracingSettings
from cluster.version import __version__

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
    """One process's spans. All methods may be called from any thread."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
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
        named = {PREFIX + name: value for name, value in attributes.items()}
        return self.tracer.start_span(name, trace.set_span_in_context(over), kind, named, start_time=at_ns)

    def work(self, name: str, parent: Place, began_ns: int, ended_ns: int, **attributes: Any) -> None:
        """A span of what was done for another process, from its begin to its end."""
        self.begin(name, parent, began_ns, kind=SpanKind.SERVER, **attributes).end(ended_ns)

    def flush(self) -> None:
        """Sends what is left. Blocks for FAREWELL_S at most."""
        sending = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        sending.start()
        sending.join(FAREWELL_S)


def open_spans(settings: TracingSettings, role: str, **attributes: str) -> Spans:
    """For this process. role: of it in the cluster.  attributes: what tells it from its like. Raises SetupError."""
    provider = TracerProvider(
        # None: what OTEL_TRACES_SAMPLER asks for, else each trace that a client does not leave out.
        None if settings.ratio is None else ParentBasedTraceIdRatio(settings.ratio),
        _resource(role, attributes),
        shutdown_on_exit=False,
    )
    delay_ms = None if os.environ.get(OTEL_BSP_SCHEDULE_DELAY) else DELAY_MS
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_Seldom())
    provider.add_span_processor(BatchSpanProcessor(exporter(settings), schedule_delay_millis=delay_ms))
    return Spans(provider)


def exporter(settings: TracingSettings) -> SpanExporter:
    """Reads the rest (headers, certificates, time limits) from the standard variables. Raises SetupError."""
    protocol, url = settings.protocol, settings.endpoint
    if protocol == "auto":
        protocol = next((given for name in _PROTOCOLS if (given := os.environ.get(name))), GRPC)
    if protocol == GRPC:
        return GrpcExporter(endpoint=url or None)
    if protocol != HTTP:
        raise SetupError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, {GRPC} or {HTTP} is needed")
    if url and not urlsplit(url).path.strip("/"):
        url = url.rstrip("/") + "/v1/traces"
    return HttpExporter(endpoint=url or None)


def place(span: Span) -> Place:
    context = span.get_span_context()
    return Place(context.trace_id, context.span_id)


class _Seldom(logging.Filter):
    """Of each kind of line one in a minute: a receiver that is down must fill no disk."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = time.monotonic(), str(record.msg)
        if now - self._written.get(kind, -SELDOM_S) < SELDOM_S:
            return False
        self._written[kind] = now
        return True


def _resource(role: str, attributes: Mapping[str, str]) -> Resource:
    """The service's name is that of OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES, where one of these has it."""
    named = {PREFIX + name: value for name, value in {"role": role, **attributes}.items()}
    process: dict[str, AttributeValue] = {
        "service.version": __version__,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    made = Resource.create(process | named)
    has_name = not str(made.attributes["service.name"]).startswith("unknown_service")
    return made if has_name else made.merge(Resource({"service.name": SERVICE}))


def _remote(place: Place) -> Span:
    return NonRecordingSpan(SpanContext(*place, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)))
