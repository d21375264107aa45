"""Registers our handlers with Serve's gRPC servers: its proxy's, and those of the ingresses behind HAProxy.

Our handlers stand around Serve's: they check the caller before they read a message (`serving/grpc/gate.py`), end
streams with their clients (`relay.py`), and bound reflection.
"""

from collections.abc import Callable
from typing import Any

import grpc
from grpc.aio._server import Server
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.runtime.front.haproxy_config import NOT_FOR_CLIENTS
from cluster.runtime.front.relay import relay_cancels
from cluster.runtime.ray_private.serve import DEFAULT_GRPC_SERVER_OPTIONS
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.keyless import KeylessLimits
from cluster.serving.grpc import keyless, registration
from cluster.serving.grpc.exchange import gated_exchange
from cluster.serving.grpc.gate import Doorkeeper, gated_stream, gated_unary

REFLECTION = "grpc.reflection."
# Few at a time, because gRPC reads a message of any size up to the server's limit before `keyless` sees it. HAProxy
# (2.8) cannot bound a stream: its filters (bwlim-in, Lua) stall one whose questions and answers take turns.
REFLECTION_LIMITS = AdmissionLimits(keyless=KeylessLimits(max_calls=32, max_calls_per_host=4))
PINGS = ("grpc.http2.max_ping_strikes", 0)  # no limit


def add_inference_service(servicer: Any, server: Any) -> None:
    """Registers the rpcs. For Serve's `grpc_servicer_functions`; works on any grpc.aio server."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is None:
        registration.add_inference_service(servicer, server)
        return
    refuse_listing(server)
    bound_reflection(server, Admission(limits=REFLECTION_LIMITS))

    def make_handler(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        """Rpcs with a stream of requests get our handler around Serve's for one request."""
        kinds = type(streaming_type)
        method = registration.ingress_method(service_method)
        if streaming_type.name == "STREAM_STREAM":
            stream = relay_cancels(factory(service_method=method, streaming_type=kinds.UNARY_STREAM))
            around = gated_exchange if service_method in registration.EXCHANGES else gated_stream
            return around(stream, _ingress)
        if streaming_type.name == "STREAM_UNARY":
            return gated_unary(factory(service_method=method, streaming_type=kinds.UNARY_UNARY), _ingress)
        handler: Callable[..., Any] = factory(service_method=method, streaming_type=streaming_type)
        return handler

    server.service_handler_factory = make_handler
    try:
        registration.add_inference_service(servicer, server, gated=True)
    finally:
        server.service_handler_factory = factory


def _ingress() -> Doorkeeper | None:
    """The ingress of this process; None in Serve's proxy."""
    try:
        ingress: Doorkeeper | None = serve.get_replica_context().servable_object
    except RayServeException:
        return None
    return ingress


def accept_pings() -> list[Any]:
    """For Serve's RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: a process of Serve's calls it before it makes its gRPC
    server. Returns the middleware of its HTTP server: none.

    gRPC's server ends a connection, and the calls on it, after a third ping within five minutes (too_many_pings).
    Clients ping more often, every 5 s for example, to keep a connection while a long unary call sends nothing. Serve
    has no setting.
    """
    if PINGS not in DEFAULT_GRPC_SERVER_OPTIONS:
        DEFAULT_GRPC_SERVER_OPTIONS.append(PINGS)
    return []


def refuse_listing(server: Server) -> None:
    """Refuses Serve's list of applications, which its servers give to everybody."""
    handler = grpc.unary_unary_rpc_method_handler(_refuse)
    # Not by `server`'s own method, which would turn it into a call to a replica.
    Server.add_registered_method_handlers(server, "ray.serve.RayServeAPIService", {"ListApplications": handler})


def bound_reflection(server: Server, admission: Admission) -> None:
    """Bounds reflection, which Serve answers on `server` itself: it does not count these calls, and they may stay."""
    register = server.add_registered_method_handlers

    def bounded(service: str, handlers: dict[str, Any]) -> None:
        if service.startswith(REFLECTION):
            handlers = {name: keyless.bounded(handler, admission) for name, handler in handlers.items()}
        register(service, handlers)

    vars(server)["add_registered_method_handlers"] = bounded  # Serve calls it later, for reflection


async def _refuse(request: bytes, context: Any) -> None:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, NOT_FOR_CLIENTS)
