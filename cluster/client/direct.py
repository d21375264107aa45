"""Goes past the environment's proxies to this machine's addresses and to those of `no_proxy`.

gRPC and urllib use `http_proxy` for every address, and no proxy leads to this machine's loopback.
"""

import ipaddress
import re
import urllib.request
from urllib.parse import urlsplit

_NO_PROXY = ("grpc.enable_http_proxy", 0)


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


def grpc_options(target: str) -> list[tuple[str, int | str]]:
    """Returns options for a channel to gRPC's `target`: "host:port", "dns:host:port", "unix:path",
    "ipv4:host:port,host:port" and so on."""
    if target.startswith(("unix:", "unix-abstract:")):
        return [_NO_PROXY]
    addresses = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", target).split(",")
    options: list[tuple[str, int | str]] = []
    if all(is_direct(address.rpartition(":")[0]) for address in addresses):
        options.append(_NO_PROXY)
    if len(addresses) > 1:  # else gRPC sends all of them as the server's name, and HAProxy refuses that
        options.append(("grpc.default_authority", addresses[0]))
    return options


def read_url(url: str, timeout_s: float) -> str:
    """Returns the text at an HTTP address. Raises OSError."""
    host = urlsplit(url).hostname or ""
    handlers = [urllib.request.ProxyHandler({})] if is_direct(host) else []
    with urllib.request.build_opener(*handlers).open(url, timeout=timeout_s) as reply:
        return str(reply.read().decode())
