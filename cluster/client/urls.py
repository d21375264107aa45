"""Reads the addresses of HTTP servers, as options have them. Connects to none."""

from urllib.parse import SplitResult, urlsplit

from cluster.errors import SetupError
from cluster.inputs import is_host, shown

PATHS = ("", "/v1")  # of a base URL: OpenAI's clients want it with /v1


def server_url(address: str, option: str, *, scheme: str = "http") -> SplitResult:
    """The URL of a server, without a path.

    address: HOST:PORT, or a URL.  scheme: of one that has none.  Raises SetupError.
    """
    try:
        parts = urlsplit(address if "://" in address else f"{scheme}://{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise SetupError(f"{option} is {shown(address)}: {error}") from None
    named = f"[{host}]" if ":" in host else host
    plain = parts.netloc.lower() == (named if port is None else f"{named}:{port}")  # no user, no port such as +1
    if parts.scheme not in ("http", "https") or not is_host(host) or port == 0 or not plain or _has_space(address):
        raise SetupError(f"{option} is {shown(address)}, HOST:PORT or http://HOST:PORT is needed")
    if parts.path.rstrip("/") not in PATHS or parts.query or parts.fragment:
        raise SetupError(f"{option} is {shown(address)}, HOST:PORT or http://HOST:PORT without a path is needed")
    return parts._replace(path="")


def _has_space(text: str) -> bool:
    """`urlsplit` drops some."""
    return any(char.isspace() for char in text)
