"""Goes past the environment's proxies to this machine's addresses and to those of `no_proxy`.

gRPC and urllib use `http_proxy` for every address, and no proxy leads to this machine's loopback.
"""

import ipaddress
import re
import urllib.request
from urllib.parse import urlsplit


def is_direct(host: str) -> bool:
    """Returns whether no proxy is used: for this machine always, else as urllib decides.

    host: a name or an address, IPv6 with or without brackets.
    """
    host = host.strip("[]").lower()
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bool(urllib.request.proxy_bypass(host))
    return address.is_loopback or address.is_unspecified or bool(urllib.request.proxy_bypass(host))


def grpc_options(target: str) -> list[tuple[str, int]]:
    """Returns options for a channel to gRPC's `target`: "host:port", "dns:host:port", "unix:path" and so on."""
    host = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", target).rpartition(":")[0]
    direct = target.startswith(("unix:", "unix-abstract:")) or is_direct(host)
    return [("grpc.enable_http_proxy", 0)] if direct else []


def read_url(url: str, timeout_s: float) -> str:
    """Returns the text at an HTTP address. Raises OSError."""
    host = urlsplit(url).hostname or ""
    handlers = [urllib.request.ProxyHandler({})] if is_direct(host) else []
    with urllib.request.build_opener(*handlers).open(url, timeout=timeout_s) as reply:
        return str(reply.read().decode())
