"""Adds to the HAProxy configuration of Serve (2.60) what Serve has no setting for. Starts nothing."""

import re
from collections.abc import Mapping
from pathlib import Path

from cluster.runtime.front.haproxy_http import adapted_http, write_http_answers
from cluster.runtime.front.haproxy_text import replaced
from cluster.wire import HEALTH_METHODS

NOT_FOR_CLIENTS = "the list of applications is not for clients"
# HAProxy's own answers to gRPC clients stand in files, because its replies without a body have no content-type, and
# some clients then do not look at the code.
UNDELIVERED, STARTING, FORBIDDEN = "undelivered.http", "starting.http", "forbidden.http"
TOO_LARGE, LEAVING = "too-large.http", "leaving.http"
ANSWERS = {
    UNDELIVERED: (14, "no process of the server took this call to its end: try again"),
    STARTING: (14, "the server is starting: try again"),
    FORBIDDEN: (7, NOT_FOR_CLIENTS),
    TOO_LARGE: (3, "the request has too many bytes for a health call"),
    LEAVING: (14, "this node leaves the cluster: ask another"),
}
SERVE_LEAVES = '"This node is being drained." if is_healthz'  # at the end of a rule of Serve's
MAX_HEALTH_BYTES = 4096
CONNECT, RETRIES = "250ms", 8  # the kernel of a living ingress's machine answers within a round trip
# What an ingress answers a check of HAProxy's, in hexadecimal digits: success, DRAINING, UNHEALTHY.
SUCCESS, FAILURES = "73756363657373", "445241494E494E47|554E4845414C544859"
CONCLUSIVE = rf"\g<1>rbinary {SUCCESS}|{FAILURES}\n\g<1>min-recv 0 binary {SUCCESS}"
SYSLOG = "127.0.0.1:514"  # Serve's default: a line for every request, to whoever listens


def write_answers(folder: Path) -> None:
    write_http_answers(folder)
    for name, (code, message) in ANSWERS.items():
        lines = ["HTTP/1.1 200 OK", "content-type: application/grpc", "content-length: 0", f"grpc-status: {code}"]
        (folder / name).write_bytes("\r\n".join([*lines, f"grpc-message: {message}", "", ""]).encode())


def adapted(config: str, folder: Path, *, host: str = "", tls: str = "") -> str:
    """The configuration with our changes. Raises ValueError when Serve's differs from the known one.

    folder: has the files of `write_answers`.  host: the address for gRPC, "" for Serve's.  tls: from `tls_options`.
    """
    # A user who can write to this socket can send all traffic elsewhere.
    config = replaced(config, r"^(\s+stats socket \S+ mode )666(?= level admin)", r"\g<1>600")
    config = config.replace(f"    log {SYSLOG} local0 info\n", "")
    # HAProxy's own pages have no password: they are for this machine only.
    config = replaced(config, r"(frontend prometheus\n\s+bind )(?=:\d+$)", r"\g<1>127.0.0.1")
    config = replaced(config, r"(listen stats\n\s+bind )\*(?=:\d+$)", r"\g<1>127.0.0.1")
    if "frontend grpc_frontend" in config:
        config = _adapted_grpc(config, folder, host, tls)
    return adapted_http(config, folder, host=host, tls=tls)


def _adapted_grpc(config: str, folder: Path, host: str, tls: str) -> str:
    listen = rf"\g<1>{host}\g<3>" if host else r"\g<1>\g<2>\g<3>"
    leaves = SERVE_LEAVES in config
    config = replaced(
        config,
        r"^(frontend grpc_frontend\n(?:.*\n)*?\s+bind )(\S+)(:\d+ proto h2)\n",
        # Without the header all clients would look like this host, and could not take turns.
        rf"{listen}{tls}\n    http-request set-header x-forwarded-for %[src]\n{_health_rules(folder, leaves)}",
    )
    # HAProxy (2.8) stops reading from a connection when one of its streams waits for a client: a client that does not
    # read would stop all other streams and health. So each call has a connection, which the next one uses again.
    config = replaced(config, r"^(    tune\.h2\.be\.max-concurrent-streams )\d+$", r"\g<1>1")
    # After a dead ingress HAProxy (2.8) waits one second, or the connect timeout if that is less, and tries another.
    config = replaced(
        config,
        r"^(    timeout connect )\d+s\n((?:.*\n)*?    retry-on .*\n)",
        rf"\g<1>{CONNECT}\n\g<2>    retries {RETRIES}\n",
    )
    # Serve turns these into 500, which a gRPC client takes as UNKNOWN and final; Serve's page is of HTTP.
    for status in (502, 503, 504):
        config = replaced(config, rf"^(    errorfile {status}) \S+$", rf"\g<1> {folder / UNDELIVERED}")
    config = replaced(
        config,
        r"^    (?:use_backend grpc_fallback_backend|http-request return .*) if is_list_applications$",
        f"    http-request return status 200 errorfile {folder / FORBIDDEN} if is_list_applications",
    )
    # An ingress that drains answers otherwise than with "success", for which HAProxy waits until its next check, 5 s
    # later. Until then the connection is open, and the ingress waits for its end before it goes.
    config = replaced(config, rf"^(    tcp-check expect )binary {SUCCESS}$", CONCLUSIVE, times=None)
    # The fallback, Serve's own proxy, ends a refused stream as if it were complete.
    config = re.sub(r"^(    server .* proto h2 check backup)$", r"\g<1> disabled", config, flags=re.MULTILINE)
    return config if has_applications(config) else _refusing(config, folder)


def _health_rules(folder: Path, leaves: bool) -> str:
    """Bounds health calls: they need no key, and gRPC would read a message of any size before it checks the caller.

    leaves: the node drains. Balancers shall send nothing more there; calls that still come are answered by the
    ingresses of other nodes, and so is health: HAProxy answers it instead.
    """
    leaving = f"    http-request return status 200 errorfile {folder / LEAVING} if is_health\n" if leaves else ""
    return (
        f"    acl is_health path_beg /grpc.health.v1.Health/ {' '.join(HEALTH_METHODS)}\n"
        f"    http-request wait-for-body time 5s at-least {MAX_HEALTH_BYTES} if is_health\n"
        f"    http-request return status 200 errorfile {folder / TOO_LARGE} "
        f"if is_health {{ req.body_len ge {MAX_HEALTH_BYTES} }}\n{leaving}"
    )


def _refusing(config: str, folder: Path) -> str:
    """Before Serve knows an application, refuses calls with a code after which clients try again."""
    return re.sub(
        r"^    http-request return status 200 content-type application/grpc hdr grpc-status 5 .*$",
        f"    http-request return status 200 errorfile {folder / STARTING}",
        config,
        flags=re.MULTILINE,
    )


def has_applications(config: str) -> bool:
    """Whether the configuration has an application with gRPC."""
    return re.search(r"^    acl is_\S+ req\.hdr\(application\)", config, flags=re.MULTILINE) is not None


def listen_addresses(config: str) -> list[str]:
    """The addresses in HAProxy's notation: "127.0.0.1:9000", "*:8000"."""
    return re.findall(r"^\s+bind (\S+:\d+)", config, flags=re.MULTILINE)


def admin_socket(config: str) -> Path:
    found = re.search(r"^\s*stats socket (\S+) .*level admin", config, flags=re.MULTILINE)
    if found is None:
        raise ValueError("this Ray Serve gives HAProxy no socket for its administrator")
    return Path(found[1])


def with_sockets(config: str, admin: Path, fds: Mapping[str, int], states: bool) -> str:
    """The adapted configuration for an HAProxy that inherits its listening sockets.

    admin: the path of its own admin socket.  fds: for each of `listen_addresses`.
    states: whether it begins with the servers' states of its predecessor.
    """
    config = replaced(
        config, r"^(\s+stats socket )\S+( mode 600 level admin) expose-fd listeners$", rf"\g<1>{admin}\g<2>"
    )
    if not states:
        config = config.replace("    load-server-state-from-file global\n", "")
    return re.sub(r"^(\s+bind )(\S+:\d+)", lambda bind: f"{bind[1]}fd@{fds[bind[2]]}", config, flags=re.MULTILINE)
