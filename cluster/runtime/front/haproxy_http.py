"""The part of HAProxy's configuration for HTTP: OpenAI's API, in front of all ingresses. Starts nothing."""

import json
from pathlib import Path

from cluster.runtime.front.haproxy_text import replaced

# HAProxy's own answers, in the shape that OpenAI's clients read.
UNDELIVERED, STARTING, FORBIDDEN, TLS_ONLY = "undelivered.json", "starting.json", "forbidden.json", "tls.json"
ANSWERS = {
    UNDELIVERED: ("503 Service Unavailable", "no process of the server took this call to its end: try again"),
    STARTING: ("503 Service Unavailable", "the server is starting: try again"),
    FORBIDDEN: ("403 Forbidden", "the list of applications is not for clients"),
    TLS_ONLY: ("403 Forbidden", "this server speaks TLS, and this port does not: use gRPC"),
}
RETRY_AFTER_S = 1
# Serve's own headers, with which a client could change how Serve treats its call.
SERVES_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id",
                  "serve-multiplexed-model-id", "x-forwarded-proto", "forwarded")  # fmt: skip


def write_http_answers(folder: Path) -> None:
    for name, (status, message) in ANSWERS.items():
        kind = "server_error" if status.startswith("503") else "permission_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}"]
        if status.startswith("503"):
            lines.append(f"retry-after: {RETRY_AFTER_S}")
        (folder / name).write_bytes("\r\n".join([*lines, "", body]).encode())


def adapted_http(config: str, folder: Path, *, host: str = "", tls: bool = False) -> str:
    """host: the address to listen on, "" for Serve's. Raises ValueError when Serve's differs from the known one."""
    listen = rf"\g<1>{host}\g<3>" if host else r"\g<1>\g<2>\g<3>"
    rules = ["http-request set-header x-forwarded-for %[src]"]
    rules += [f"http-request del-header {name}" for name in SERVES_HEADERS]
    config = replaced(
        config,
        r"^(frontend http_frontend\n\s+bind )(\S+)(:\d+)\n",
        listen + "\n" + "".join(f"    {rule}\n" for rule in rules),
    )
    config = replaced(
        config,
        r"^    http-request return .* if routes$",
        f"    http-request return status 403 errorfile {folder / FORBIDDEN} if routes"
        + (f"\n    http-request return status 403 errorfile {folder / TLS_ONLY}" if tls else ""),
    )
    config = replaced(
        config,
        r"^(backend default_backend\n)    http-request return .*$",
        rf"\g<1>    http-request return status 503 errorfile {folder / STARTING}",
    )
    # A call that a dead ingress had in hand goes to another one while nothing was sent back: an answer depends on
    # nothing but its request, and the sequence of the dead one ends with it.
    errors = "".join(f"    errorfile {status} {folder / UNDELIVERED}\n" for status in (502, 503, 504))
    config = replaced(
        config,
        r"^(backend (?!default_)\S+\n    log global\n)(?=    # Enable HTTP connection reuse)",
        rf"\g<1>    retry-on conn-failure empty-response\n{errors}",
        times=None,
    )
    # The fallback, Serve's own proxy, is for servers whose ingresses do not listen themselves.
    return replaced(config, r"^(    server \S+ \S+ check backup)$", r"\g<1> disabled", times=None)
