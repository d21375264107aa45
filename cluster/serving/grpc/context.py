"""A gRPC call's context: who calls, as admission takes it, and the status with which a call ends."""

import logging
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import unquote

import grpc

from cluster.errors import ClusterError, Overloaded
from cluster.wire import RETRY_KEY

log = logging.getLogger(__name__)

MAX_DETAILS_CHARS = 1000
MAX_DETAILS_BYTES = 2000  # gRPC writes a byte that is not ASCII as three; 8 KB of trailers is the limit


class GrpcContext(Protocol):
    """The part of Serve's `RayServegRPCContext` that is used here."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...

    def peer(self) -> str: ...


class StreamFailed(Exception):
    """Ends a stream whose context has its code and details already; the message is the details."""


def metadata_of(context: GrpcContext) -> dict[str, str]:
    return dict(context.invocation_metadata() or ())


def peer_of(context: GrpcContext) -> str:
    """Returns the peer's IP address, "" where it has none.

    gRPC writes "ipv4:127.0.0.1:51234" or "ipv6:[::1]:51234", also percent-encoded, and Serve sometimes nothing.
    """
    return unquote(context.peer() or "").partition(":")[2].rpartition(":")[0].strip("[]")


def set_status(context: GrpcContext, error: Exception, request_id: str = "") -> str:
    """Sets the code and the details that a client sees of an error; returns the details.

    An error that is not written for clients goes to the log, and the client gets the request's id to ask after it.
    """
    code = error.grpc_code if isinstance(error, ClusterError) else "INTERNAL"
    if isinstance(error, ClusterError) and error.public:
        details = str(error)
    else:
        log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
        details = f"internal error, request id {request_id}; see the server's log"
    details = _truncate(details)
    context.set_code(grpc.StatusCode[code])
    context.set_details(details)
    if isinstance(error, Overloaded):
        context.set_trailing_metadata([(RETRY_KEY, str(round(1000 * error.retry_after_s)))])
    return details


def _truncate(details: str) -> str:
    if len(details) <= MAX_DETAILS_CHARS and len(details.encode()) <= MAX_DETAILS_BYTES:
        return details
    head = details[: MAX_DETAILS_CHARS - 1].encode()[: MAX_DETAILS_BYTES - 3]
    return head.decode(errors="ignore") + "…"
