"""A receiver of OTLP traces, over gRPC and HTTP, that keeps what comes."""

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


class Received:
    """One span, with the role of the process that sent it."""

    def __init__(self, span, resource):
        self.name, self.kind, self.status = span.name, span.kind, span.status.code
        self.trace_id, self.span_id, self.parent_id = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.began, self.ended = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes = {a.key: _plain(a.value) for a in span.attributes}
        self.resource = {a.key: _plain(a.value) for a in resource.attributes}
        self.events = [event.name for event in span.events]
        self.role = self.resource.get("moecluster.role", "")

    def __repr__(self):
        return f"{self.role}: {self.name}"


class OtlpReceiver(pb_grpc.TraceServiceServicer):
    """Listens on free ports of this machine from the start to `close`."""

    def __init__(self):
        self._came = threading.Condition()
        self.spans, self.headers = [], []
        self._grpc = grpc.server(ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._grpc)
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.take(pb.ExportTraceServiceRequest.FromString(body), {"path": self.path, **self.headers})
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http_port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def Export(self, request, context):
        self.take(request, dict(context.invocation_metadata()))
        return pb.ExportTraceServiceResponse()

    def take(self, request, headers):
        with self._came:
            self.headers.append(headers)
            for group in request.resource_spans:
                for scope in group.scope_spans:
                    self.spans += [Received(span, group.resource) for span in scope.spans]
            self._came.notify_all()

    def trace(self, trace_id, until, timeout_s=30.0):
        """The spans of one trace, once `until(spans)`; what there is when the time is over."""
        deadline = time.monotonic() + timeout_s
        with self._came:
            while True:
                found = [span for span in self.spans if span.trace_id == trace_id]
                left = deadline - time.monotonic()
                if until(found) or left <= 0:
                    return found
                self._came.wait(left)

    def close(self):
        self._grpc.stop(None)
        self._http.shutdown()
        self._http.server_close()


def by_name(spans):
    """name -> its spans in the order of their begin."""
    named = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        named[span.name].append(span)
    return named


def _plain(value):
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_plain(one) for one in found.values] if kind == "array_value" else found
