"""The part of HAProxy's configuration for HTTP: OpenAI's API, in front of all ingresses. Starts nothing.

With TLS the port takes both: calls by TLS, and /-/healthz in plain text, since KubeRay's operator and load balancers
ask in no other way. A front of bytes looks at a connection's beginning, and hands it with its address to one of two
Unix sockets in our private folder.

After a reload, clients keep their connections to the HAProxy that leaves. It knows only the ingresses of its time, so
it hands a call that still comes to its successor, over a third socket. (HTTP/2 has a frame that sends clients away.)
"""

import json
import os
from pathlib import Path

from cluster.runtime.front.haproxy_text import replaced

# HAProxy's own answers, in the shape that OpenAI's clients read.
UNDELIVERED, STARTING, FORBIDDEN, TLS_ONLY = "undelivered.json", "starting.json", "forbidden.json", "tls.json"
UNREADABLE, SLOW, FAILED, NO_METHOD = "unreadable.json", "slow.json", "failed.json", "method.json"
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")  # uvicorn answers an odd one in plain text
ANSWERS = {
    UNREADABLE: ("400 Bad Request", "this is no HTTP that can be read, or its client has closed the connection"),
    NO_METHOD: ("405 Method Not Allowed", f"no call has this method, only {', '.join(METHODS[:3])}"),
    SLOW: ("408 Request Timeout", "the request did not come in time"),
    FAILED: ("500 Internal Server Error", "the front failed at this call"),
    UNDELIVERED: ("503 Service Unavailable", "no process of the server took this call to its end: try again"),
    STARTING: ("503 Service Unavailable", "the server is starting: try again"),
    FORBIDDEN: ("403 Forbidden", "the list of applications is not for clients"),
    TLS_ONLY: ("403 Forbidden", "this server speaks TLS: call it by https"),
}
_TYPES = {"403": "permission_error", "500": "server_error", "503": "server_error"}
RETRY_AFTER_S = 1
FRONT = r"\g<1>"  # the frontend's own line
# A call whose body fits the buffer can go to another ingress; HAProxy holds such a body until it is whole.
BUFFER_BYTES, HEADER_BYTES = 64 << 10, 8 << 10
REQUEST_S, IDLE_S = 60, 300  # for a call to come, and between two of a connection
AGAIN = "again"  # the socket where the newest HAProxy takes its predecessors' calls
HELLO_S = 10  # in which a connection shows whether it speaks TLS
# Serve's own headers, with which a client could change how Serve treats its call.
SERVES_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id",
                  "serve-multiplexed-model-id", "x-forwarded-proto", "forwarded")  # fmt: skip
# Serve takes these for UTF-8; it answers a call with other bytes there with 500.
DECODED_HEADERS = ("x-request-id", "x-session-id", "traceparent", "tracestate")


def write_http_answers(folder: Path) -> None:
    for name, (status, message) in ANSWERS.items():
        kind = _TYPES.get(status[:3], "invalid_request_error")
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}"]
        if status.startswith("503"):
            lines.append(f"retry-after: {RETRY_AFTER_S}")
        (folder / name).write_bytes("\r\n".join([*lines, "", body]).encode())


def adapted_http(config: str, folder: Path, *, host: str = "", tls: str = "") -> str:
    """host: the address to listen on, "" for Serve's.  tls: from `tls_options`.

    Raises ValueError when Serve's differs from the known one.
    """
    listen = rf"\g<1>\g<2>{host}\g<4>" if host else r"\g<1>\g<2>\g<3>\g<4>"
    rules = [f"bind unix@{folder / AGAIN} accept-proxy name {AGAIN}"]
    rules += [f"errorfile {name}" for name in _own_answers(folder)]
    rules += [f"timeout http-request {REQUEST_S}s", f"timeout http-keep-alive {IDLE_S}s"]
    rules.append("http-request set-header x-forwarded-for %[src]")
    rules += [f"http-request del-header {name}" for name in SERVES_HEADERS]
    rules += [f"http-request del-header {name} if {{ req.hdr({name}) -m reg '[^ -~]' }}" for name in DECODED_HEADERS]
    answer = f"http-request return status 405 errorfile {folder / NO_METHOD}"
    rules.append(f"{answer} unless {{ method {' '.join(METHODS)} }}")
    too_large = f"{{ req.hdr_val(content-length) gt {BUFFER_BYTES - HEADER_BYTES} }}"
    rules.append(f"http-request wait-for-body time {REQUEST_S}s unless {too_large}")
    first = f"!{{ so_name {AGAIN} }}"  # a call comes from its client, not from another HAProxy
    rules.append(f"use_backend http_again if {{ stopping }} {first}")
    config = replaced(
        config,
        r"^(frontend http_frontend\n)(\s+bind )(\S+)(:\d+)\n",
        (_both(listen, folder, tls) if tls else f"{listen}\n") + "".join(f"    {rule}\n" for rule in rules),
    )
    refusals = f"    http-request return status 403 errorfile {folder / FORBIDDEN} if routes"
    if tls:
        refusals += f"\n    http-request return status 403 errorfile {folder / TLS_ONLY} if !{{ ssl_fc }} {first}"
    config = replaced(config, r"^    http-request return .* if routes$", refusals)
    errors = "".join(f"    errorfile {status} {folder / UNDELIVERED}\n" for status in (502, 503, 504))
    again = (
        f"backend http_again\n    http-reuse never\n{errors}    server {AGAIN} unix@{folder / AGAIN} send-proxy-v2\n"
    )
    config = replaced(
        config,
        r"^(backend default_backend\n)    http-request return .*$",
        rf"{again}\g<1>    http-request return status 503 errorfile {folder / STARTING}",
    )
    # A call that a dead ingress had in hand goes to another one while nothing was sent back: an answer depends on
    # nothing but its request. After one on a connection that is used again HAProxy (2.8) would close the client's.
    config = replaced(
        config,
        r"^(backend (?!default_)\S+\n    log global\n    # Enable HTTP connection reuse.*\n)    http-reuse always$",
        rf"\g<1>    http-reuse never\n    option http-server-close\n    retry-on conn-failure empty-response\n{errors}"
        "    # Above: ours",
        times=None,
    )
    # The fallback, Serve's own proxy, is for servers whose ingresses do not listen themselves.
    return replaced(config, r"^(    server \S+ \S+ check backup)$", r"\g<1> disabled", times=None)


def _own_answers(folder: Path) -> list[str]:
    """HAProxy's answers to calls that reach no ingress, as `errorfile` takes them."""
    return [f"{status} {folder / name}" for status, name in ((400, UNREADABLE), (408, SLOW), (500, FAILED))]


def _both(listen: str, folder: Path, tls: str) -> str:
    """The front of bytes, and the beginning of that of calls, up to its rules. Each HAProxy has sockets of its own."""
    secure, plain = folder / f"t{os.getpid()}", folder / f"p{os.getpid()}"
    return (
        f"frontend http_port\n{listen.removeprefix(FRONT)}\n"
        "    mode tcp\n"
        f"    tcp-request inspect-delay {HELLO_S}s\n"
        "    tcp-request content accept if { req.ssl_hello_type 1 }\n"
        "    tcp-request content accept if HTTP\n"
        "    tcp-request content reject\n"
        "    use_backend http_tls if { req.ssl_hello_type 1 }\n"
        "    default_backend http_plain\n"
        f"backend http_tls\n    mode tcp\n    server tls unix@{secure} send-proxy-v2\n"
        f"backend http_plain\n    mode tcp\n    server plain unix@{plain} send-proxy-v2\n"
        "frontend http_frontend\n"
        f"    bind unix@{secure} accept-proxy{tls.replace('alpn h2', 'alpn h2,http/1.1')}\n"
        f"    bind unix@{plain} accept-proxy\n"
    )
