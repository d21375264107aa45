"""Who calls, and whether it may: by a call's metadata and its peer's address. Knows no gRPC and no requests.

metadata: by lower-case names, "authorization" and "x-client-id" of the caller, "x-forwarded-for" of HAProxy.
peer: as gRPC writes it, "ipv4:127.0.0.1:51234" or "ipv6:[::1]:51234", also percent-encoded.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from ipaddress import ip_address
from urllib.parse import unquote

from cluster.errors import Forbidden, Overloaded, Unauthenticated
from cluster.serving.admission.api_keys import ApiKeys
from cluster.serving.admission.strangers import StrangerLimits, Strangers

MAX_CLIENT_CHARS = 128
RETRY_S = 1.0


class Callers:
    """Lets calls in. For one event loop.

    keys: whom it answers; None is everybody.
    local_only: whether it answers only who calls from this machine: what stands between it and the others.
    max_requests: at a time, of those with a key, or of all where none is asked for.
    """

    def __init__(
        self,
        keys: ApiKeys | None = None,
        *,
        local_only: bool = False,
        max_requests: int = 1024,
        strangers: StrangerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._local_only = local_only
        self._max_requests = max_requests
        self._num_requests = 0
        self._strangers = Strangers(strangers or StrangerLimits(), clock)

    @contextmanager
    def request(self, metadata: Mapping[str, str], peer: str) -> Iterator[str]:
        """Whom a request counts for, while it lasts. Raises Forbidden, Unauthenticated, Overloaded."""
        client = self.identify(metadata, peer)
        if self._num_requests >= self._max_requests:
            raise Overloaded(
                f"this ingress has {self._max_requests} requests, as many as it takes: try again in {RETRY_S:g} s",
                RETRY_S,
            )
        with nullcontext() if self._keys is None else self._keys.admitted(client):
            self._num_requests += 1
            try:
                yield client
            finally:
                self._num_requests -= 1

    def identify(self, metadata: Mapping[str, str], peer: str) -> str:
        """Whom a call counts for that needs a key. Raises as `request`."""
        self.ask(peer)
        if self._keys is None:
            return client_of(metadata, peer)
        try:
            return self._keys.identify(metadata.get("authorization"))
        except Unauthenticated:
            self._strangers.called(host_of(metadata, peer))
            raise

    def ask(self, peer: str) -> None:
        """Lets a short call in that needs no key. Raises Forbidden."""
        if self._local_only and not is_local(peer):
            raise Forbidden("this port is for the proxy of its machine only: call the served one")

    @contextmanager
    def stay(self, metadata: Mapping[str, str], peer: str) -> Iterator[None]:
        """Lets a call in, while it lasts, that needs no key and may stay. Raises Forbidden, Overloaded."""
        self.ask(peer)
        with self._strangers.staying(host_of(metadata, peer)):
            yield


def client_of(metadata: Mapping[str, str], peer: str) -> str:
    """Whom a request without a key counts for where clients take turns: its x-client-id, or the host it comes from."""
    return (metadata.get("x-client-id") or host_of(metadata, peer))[:MAX_CLIENT_CHARS]


def host_of(metadata: Mapping[str, str], peer: str) -> str:
    """The host that a call comes from: what HAProxy says, else its peer."""
    return (metadata.get("x-forwarded-for") or (peer or "").rpartition(":")[0])[:MAX_CLIENT_CHARS]


def is_local(peer: str) -> bool:
    host = unquote(peer or "").partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
