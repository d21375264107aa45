"""Finds the host and the client of a call, by its metadata and its peer. Knows no gRPC.

metadata: of a call, or the headers of an HTTP request; names in lower case. Our HAProxy sets "x-forwarded-for" over
what a client sends; "x-client-id" is the client's own choice.
peer: the IP address of the connection's other side without its port, "" where it has none.
"""

from collections.abc import Mapping
from ipaddress import ip_address

MAX_CLIENT_CHARS = 128


def client_of(metadata: Mapping[str, str], peer: str) -> str:
    """Returns the name under which a call without a key takes its turn: its x-client-id, else its host."""
    return (metadata.get("x-client-id") or host_of(metadata, peer))[:MAX_CLIENT_CHARS]


def host_of(metadata: Mapping[str, str], peer: str) -> str:
    """Returns the host that a call comes from: the one that HAProxy names, else its peer."""
    return (metadata.get("x-forwarded-for") or peer)[:MAX_CLIENT_CHARS]


def is_local(peer: str) -> bool:
    """Returns whether the peer is this machine."""
    try:
        address = ip_address(peer)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
