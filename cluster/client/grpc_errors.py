"""Our errors for gRPC's: of a server that answers, of a connection that breaks, of one that does not come about."""

import math
import re
from collections.abc import Iterable
from typing import cast

import grpc

from cluster.errors import BrokenStream, ClusterError, InvalidRequest, Overloaded, Unauthenticated, Unavailable
from cluster.wire import RETRY_KEY

_ERRORS: dict[grpc.StatusCode, type[ClusterError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}
# gRPC has one code for a broken connection, HAProxy's resets of streams get others; only its words tell them from a
# server's own.
BREAKING = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN,
)  # fmt: skip
BREAKS = re.compile(
    "^CANCELLED$|RST_STREAM|GOAWAY|[Ss]ocket closed|Connection reset|Broken pipe|Stream removed|recvmsg"
)


def error_of(error: grpc.RpcError, address: str, *, has_key: bool) -> ClusterError:
    """address, has_key: of the client; the advice names them. For a failed connection gRPC has one code, and the reason
    in its words alone: so the words choose the error, too."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        reason = details.rpartition("last error: ")[2]
        if "Connection refused" not in reason:
            return Unavailable(
                f"no connection to {address} ({_short(reason)}): does the server speak TLS, trust this "
                "client's certificate, and this client the server's? See --tls-ca, --tls-cert and --tls-key"
            )
        return Unavailable(f"no server answers at {address}: start one with `moe-cluster serve MODEL_DIR`")
    if code == grpc.StatusCode.UNAVAILABLE and ("DNS resolution failed" in details or "errors resolving" in details):
        return Unavailable(f"no host is known for {address}: give --address HOST:PORT, as 127.0.0.1:9000")
    if code == grpc.StatusCode.UNIMPLEMENTED and "http2 header with status" in details:
        return ClusterError(f"{address} speaks HTTP, not gRPC: give --address the port of gRPC")
    if code in BREAKING and BREAKS.search(details):
        return BrokenStream(f"the connection to {address} broke off: {code.name}: {_short(details)}")
    if code == grpc.StatusCode.UNAUTHENTICATED and not has_key:
        details += " (of this command: set $MOE_CLUSTER_API_KEY, or give --api-key-file)"
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"{code.name}: {details}", _retry_after_s(error))
    return _ERRORS.get(code, ClusterError)(f"{code.name}: {details}")


def _retry_after_s(error: grpc.RpcError) -> float:
    """The server's hint; infinite where it gives none: the same call would be refused again."""
    metadata = cast(Iterable[tuple[str, str]], error.trailing_metadata() or ())  # its stub says that it is one pair
    hint = dict(metadata).get(RETRY_KEY, "")
    return int(hint) / 1000 if hint.isdigit() else math.inf


def _short(reason: str) -> str:
    """Returns the end of OpenSSL's and gRPC's chain of causes: the part about which a person can do something."""
    last = re.split(r"OPENSSL_internal:|UNKNOWN: |UNAVAILABLE: |ipv[46]:[^ ]*: ", reason)[-1]
    return last.split(" {")[0].strip().removesuffix(": OK").rstrip(".")[-120:]
