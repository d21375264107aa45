"""HAProxy's configuration as Serve (2.60) writes it, with what Serve has no setting for. Starts nothing."""

import re

NOT_STARTED = "the server is starting: try again"
UNDELIVERED = "no process of the server took this call to its end: try again"
NOT_FOR_CLIENTS = "the list of applications is not for clients"
SYSLOG = "127.0.0.1:514"  # Serve's default: a line for every request, to whoever listens


def adapted(config: str, *, host: str = "", tls: str = "") -> str:
    """The configuration with our changes. Raises ValueError when Serve writes another.

    host: where gRPC is served, "" for where Serve says.  tls: what `tls_options` returns.
    """
    # Whoever writes to it can send all traffic elsewhere.
    config = _replaced(config, r"^(\s+stats socket \S+ mode )666(?= level admin)", r"\g<1>600")
    config = config.replace(f"    log {SYSLOG} local0 info\n", "")
    # Its own pages, which have no password, are for this machine.
    config = _replaced(config, r"(frontend prometheus\n\s+bind )(?=:\d+$)", r"\g<1>127.0.0.1")
    config = _replaced(config, r"(listen stats\n\s+bind )\*(?=:\d+$)", r"\g<1>127.0.0.1")
    return _adapted_grpc(config, host, tls) if "frontend grpc_frontend" in config else config


def _adapted_grpc(config: str, host: str, tls: str) -> str:
    listen = rf"\g<1>{host}\g<3>" if host else r"\g<1>\g<2>\g<3>"
    config = _replaced(
        config,
        r"^(frontend grpc_frontend\n(?:.*\n)*?\s+bind )(\S+)(:\d+ proto h2)\n",
        # Without the header all clients look like this host, and could not take turns.
        rf"{listen}{tls}\n    http-request set-header x-forwarded-for %[src]\n",
    )
    # HAProxy (2.8) reads nothing more from a connection whose one stream waits for its client: a client that does not
    # read would stop all streams beside its own, and health. A connection for each call is used again after its end.
    config = _replaced(config, r"^(    tune\.h2\.be\.max-concurrent-streams )\d+$", r"\g<1>1")
    # Serve makes 500 of these, which is UNKNOWN to a gRPC client and final; its own page is of HTTP.
    for status in (502, 503, 504):
        config = _replaced(
            config,
            rf"^    errorfile {status} \S+$",
            f"    http-error status {status} content-type application/grpc hdr grpc-status 14 "
            f'hdr grpc-message "{UNDELIVERED}"',
        )
    config = _replaced(
        config,
        r"^    (?:use_backend grpc_fallback_backend|http-request return .*) if is_list_applications$",
        "    http-request return status 200 content-type application/grpc hdr grpc-status 7 "
        f'hdr grpc-message "{NOT_FOR_CLIENTS}" if is_list_applications',
    )
    # The fallback, Serve's own proxy, ends a stream that was refused as if it were whole.
    config = re.sub(r"^(    server .* proto h2 check backup)$", r"\g<1> disabled", config, flags=re.MULTILINE)
    return _refusing_while_empty(config)


def _refusing_while_empty(config: str) -> str:
    """Before Serve has told of an application, a call is refused with a code that clients try again after."""
    if re.search(r"^    acl is_\S+ req\.hdr\(application\)", config, flags=re.MULTILINE):
        return config
    return re.sub(
        r'hdr grpc-status 5 hdr grpc-message "[^"]*"',
        f'hdr grpc-status 14 hdr grpc-message "{NOT_STARTED}"',
        config,
    )


def _replaced(config: str, pattern: str, replacement: str) -> str:
    changed, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"this Ray Serve writes an HAProxy configuration that moe-cluster does not know: {pattern!r}")
    return changed
