"""A gRPC call's context: who calls, as admission takes it, and the status with which a call ends."""

import logging
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol
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


class HintedDetails(str):
    """Details of a status, and the seconds after which the client may try again.

    Pickled it is plain text: a process of an older version knows no such class.
    """

    retry_after_s: float

    def __new__(cls, details: str, retry_after_s: float) -> "HintedDetails":
        made = super().__new__(cls, details)
        made.retry_after_s = retry_after_s
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


class StreamFailed(Exception):
    """Ends a stream whose context has its code already; the message is the details.

    retry_after_s: an attribute beside the arguments, since a process of an older version makes the message of them.
    """

    retry_after_s: float | None = None

    def __str__(self) -> str:
        """Serve's proxy asks for it where the context has no details, and sets it on the context that it was given."""
        details = super().__str__()
        return details if self.retry_after_s is None else HintedDetails(details, self.retry_after_s)


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
    details = details_of(error, request_id)
    context.set_code(grpc.StatusCode[code])
    context.set_details(details)
    if isinstance(error, Overloaded):
        context.set_trailing_metadata([retry_hint(error.retry_after_s)])
    return details


def details_of(error: Exception, request_id: str = "") -> str:
    """The details that a client sees of an error, which goes to the log if it is not written for clients."""
    if isinstance(error, ClusterError) and error.public:
        return _truncate(str(error))
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return _truncate(f"internal error, request id {request_id}; see the server's log")


def retry_hint(retry_after_s: float) -> tuple[str, str]:
    """Returns the key and the value of trailing metadata."""
    return RETRY_KEY, str(round(1000 * retry_after_s))


def fail_stream(context: GrpcContext, error: Exception, request_id: str) -> NoReturn:
    """Ends a stream of Serve's own proxy. Raises StreamFailed.

    That proxy learns of a failed stream's context nothing but code and details, and of the exception its text, if the
    details are empty: so the text carries the retry hint, from which `ContextShield` makes trailing metadata.
    """
    failed = StreamFailed(set_status(context, error, request_id))
    if isinstance(error, Overloaded):
        failed.retry_after_s = error.retry_after_s
        context.set_details("")
    raise failed from None


def _truncate(details: str) -> str:
    if len(details) <= MAX_DETAILS_CHARS and len(details.encode()) <= MAX_DETAILS_BYTES:
        return details
    head = details[: MAX_DETAILS_CHARS - 1].encode()[: MAX_DETAILS_BYTES - 3]
    return head.decode(errors="ignore") + "…"
