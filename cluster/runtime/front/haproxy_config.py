"""HAProxy's configuration as Serve (2.60) writes it, with what Serve has no setting for. Starts nothing."""

import re
from collections.abc import Mapping
from pathlib import Path

NOT_FOR_CLIENTS = "the list of applications is not for clients"
# What HAProxy itself answers to gRPC clients: files of a folder, as its own replies without a body have no
# content-type, without which some clients do not look at the code.
UNDELIVERED, STARTING, FORBIDDEN = "undelivered.http", "starting.http", "forbidden.http"
TOO_LARGE = "too-large.http"
ANSWERS = {
    UNDELIVERED: (14, "no process of the server took this call to its end: try again"),
    STARTING: (14, "the server is starting: try again"),
    FORBIDDEN: (7, NOT_FOR_CLIENTS),
    TOO_LARGE: (3, "the request has too many bytes for one of health"),
}
MAX_HEALTH_BYTES = 4096
CONNECT, RETRIES = "250ms", 8  # the kernel of a living ingress's machine answers within a round trip
SYSLOG = "127.0.0.1:514"  # Serve's default: a line for every request, to whoever listens


def write_answers(folder: Path) -> None:
    for name, (code, message) in ANSWERS.items():
        lines = ["HTTP/1.1 200 OK", "content-type: application/grpc", "content-length: 0", f"grpc-status: {code}"]
        (folder / name).write_bytes("\r\n".join([*lines, f"grpc-message: {message}", "", ""]).encode())


def adapted(config: str, folder: Path, *, host: str = "", tls: str = "") -> str:
    """The configuration with our changes. Raises ValueError when Serve writes another.

    folder: with the answers.  host: where gRPC is served, "" for where Serve says.  tls: what `tls_options` returns.
    """
    # Whoever writes to it can send all traffic elsewhere.
    config = _replaced(config, r"^(\s+stats socket \S+ mode )666(?= level admin)", r"\g<1>600")
    config = config.replace(f"    log {SYSLOG} local0 info\n", "")
    # Its own pages, which have no password, are for this machine.
    config = _replaced(config, r"(frontend prometheus\n\s+bind )(?=:\d+$)", r"\g<1>127.0.0.1")
    config = _replaced(config, r"(listen stats\n\s+bind )\*(?=:\d+$)", r"\g<1>127.0.0.1")
    return _adapted_grpc(config, folder, host, tls) if "frontend grpc_frontend" in config else config


def _adapted_grpc(config: str, folder: Path, host: str, tls: str) -> str:
    listen = rf"\g<1>{host}\g<3>" if host else r"\g<1>\g<2>\g<3>"
    config = _replaced(
        config,
        r"^(frontend grpc_frontend\n(?:.*\n)*?\s+bind )(\S+)(:\d+ proto h2)\n",
        # Without the header all clients look like this host, and could not take turns.
        rf"{listen}{tls}\n    http-request set-header x-forwarded-for %[src]\n{_health_rules(folder)}",
    )
    # HAProxy (2.8) reads nothing more from a connection whose one stream waits for its client: a client that does not
    # read would stop all streams beside its own, and health. A connection for each call is used again after its end.
    config = _replaced(config, r"^(    tune\.h2\.be\.max-concurrent-streams )\d+$", r"\g<1>1")
    # HAProxy (2.8) waits a whole second, or the time for a connection, before it tries another ingress than a dead one.
    config = _replaced(
        config,
        r"^(    timeout connect )\d+s\n((?:.*\n)*?    retry-on .*\n)",
        rf"\g<1>{CONNECT}\n\g<2>    retries {RETRIES}\n",
    )
    # Serve makes 500 of these, which is UNKNOWN to a gRPC client and final; its own page is of HTTP.
    for status in (502, 503, 504):
        config = _replaced(config, rf"^(    errorfile {status}) \S+$", rf"\g<1> {folder / UNDELIVERED}")
    config = _replaced(
        config,
        r"^    (?:use_backend grpc_fallback_backend|http-request return .*) if is_list_applications$",
        f"    http-request return status 200 errorfile {folder / FORBIDDEN} if is_list_applications",
    )
    # The fallback, Serve's own proxy, ends a stream that was refused as if it were whole.
    config = re.sub(r"^(    server .* proto h2 check backup)$", r"\g<1> disabled", config, flags=re.MULTILINE)
    return config if has_applications(config) else _refusing(config, folder)


def _health_rules(folder: Path) -> str:
    """Health needs no key, and gRPC would take a message of any size into memory before it asks who calls."""
    return (
        "    acl is_health path_beg /grpc.health.v1.Health/\n"
        f"    http-request wait-for-body time 5s at-least {MAX_HEALTH_BYTES} if is_health\n"
        f"    http-request return status 200 errorfile {folder / TOO_LARGE} "
        f"if is_health {{ req.body_len ge {MAX_HEALTH_BYTES} }}\n"
    )


def _refusing(config: str, folder: Path) -> str:
    """Before Serve has told of an application, a call is refused with a code that clients try again after."""
    return re.sub(
        r"^    http-request return status 200 content-type application/grpc hdr grpc-status 5 .*$",
        f"    http-request return status 200 errorfile {folder / STARTING}",
        config,
        flags=re.MULTILINE,
    )


def has_applications(config: str) -> bool:
    """Whether Serve has told of one with gRPC."""
    return re.search(r"^    acl is_\S+ req\.hdr\(application\)", config, flags=re.MULTILINE) is not None


def listen_addresses(config: str) -> list[str]:
    """As HAProxy writes them: "127.0.0.1:9000", "*:8000"."""
    return re.findall(r"^\s+bind (\S+:\d+)", config, flags=re.MULTILINE)


def admin_socket(config: str) -> Path:
    found = re.search(r"^\s*stats socket (\S+) .*level admin", config, flags=re.MULTILINE)
    if found is None:
        raise ValueError("this Ray Serve gives HAProxy no socket for its administrator")
    return Path(found[1])


def with_sockets(config: str, admin: Path, fds: Mapping[str, int], states: bool) -> str:
    """The adapted configuration for an HAProxy that is given its listening sockets.

    admin: where its own admin socket shall be.  fds: for each of `listen_addresses`.
    states: whether it begins with what the one before it knew of the servers.
    """
    config = _replaced(
        config, r"^(\s+stats socket )\S+( mode 600 level admin) expose-fd listeners$", rf"\g<1>{admin}\g<2>"
    )
    if not states:
        config = config.replace("    load-server-state-from-file global\n", "")
    return re.sub(r"^(\s+bind )(\S+:\d+)", lambda bind: f"{bind[1]}fd@{fds[bind[2]]}", config, flags=re.MULTILINE)


def _replaced(config: str, pattern: str, replacement: str) -> str:
    changed, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"this Ray Serve writes an HAProxy configuration that moe-cluster does not know: {pattern!r}")
    return changed
