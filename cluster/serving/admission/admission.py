"""Decides whether a call is answered: by its metadata and its peer (`callers` says what these are). Knows no gRPC.

A front asks in this order: `identify`, where it can do so before it reads the call's body; then it keeps `call` open
while it works, and inside of it, for an answer of tokens, `generation`. Health and reflection need no key: `question`
for what is answered at once, `watch` for what stays open. `watcher` is for calls that follow the cluster, and
`administrator` finds who may change it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from cluster.config import DEFAULTS
from cluster.errors import Forbidden, Overloaded, Unauthenticated
from cluster.serving.admission.api_keys import ApiKeys
from cluster.serving.admission.callers import client_of, host_of, is_local
from cluster.serving.admission.keyless import KeylessCalls, KeylessLimits
from cluster.serving.admission.places import Places
from cluster.serving.admission.questions import QuestionLimits, Questions
from cluster.serving.admission.watchers import Watchers

RETRY_S = 1.0
ADMIN = "admin:"  # before an administrator's name; no name of another client has the colon


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """max_calls: at a time, of those with a key, or of all where no key is asked for.
    max_streams_per_client: generations of one client at a time; 0: any number.
    max_watchers: calls at a time that follow the cluster.
    """

    max_calls: int = DEFAULTS["max_ongoing_requests"]
    max_streams_per_client: int = DEFAULTS["max_streams_per_client"]
    max_watchers: int = DEFAULTS["max_watchers"]
    keyless: KeylessLimits = field(default_factory=KeylessLimits)
    questions: QuestionLimits = field(default_factory=QuestionLimits)


class Admission:
    """Lets calls in and counts them. For one event loop.

    keys: of the clients that it answers; None: it answers everybody.
    admins: keys of those who may also change the cluster; None: nobody may.
    local_only: answers only calls from this machine: the proxy there stands between it and all others.
    room: returns how many generations the backend has place for.  clock: monotonic seconds.
    """

    def __init__(
        self,
        keys: ApiKeys | None = None,
        limits: AdmissionLimits | None = None,
        *,
        admins: ApiKeys | None = None,
        local_only: bool = False,
        room: Callable[[], float] = lambda: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or AdmissionLimits()
        self._keys, self._local_only, self._max_calls = keys, local_only, limits.max_calls
        self._admins = admins
        self._num_calls = 0
        self._keyless = KeylessCalls(limits.keyless, clock)
        self._questions = Questions(limits.questions, clock)
        self._watchers = Watchers(limits.max_watchers)
        self._places = Places(limits.max_streams_per_client, room, clock)

    @property
    def num_running(self) -> int:
        """Generations that have begun and have not ended."""
        return self._places.num_running

    @property
    def draining(self) -> bool:
        return self._places.draining

    def drain(self) -> None:
        """Refuses new generations from now on; running and accepted ones go on."""
        self._places.drain()

    def identify(self, metadata: Mapping[str, str], peer: str) -> str:
        """Returns the client that a call counts for. Raises Forbidden, Unauthenticated, Overloaded."""
        self._check_peer(peer)
        if self._keys is None:
            return client_of(metadata, peer)
        try:
            return self._known(metadata)
        except Unauthenticated:
            self._keyless.count(host_of(metadata, peer))
            raise

    def _known(self, metadata: Mapping[str, str]) -> str:
        """The client whose key a call has. Raises Unauthenticated."""
        assert self._keys is not None
        try:
            return self._keys.identify(metadata.get("authorization"))
        except Unauthenticated:
            if name := self._admin_name(metadata):
                return ADMIN + name
            raise

    def _admin_name(self, metadata: Mapping[str, str]) -> str:
        """ "" for a call without an administrator's key."""
        try:
            return "" if self._admins is None else self._admins.identify(metadata.get("authorization"))
        except Unauthenticated:
            return ""

    @property
    def has_admins(self) -> bool:
        """Whether anybody may change the cluster by a call."""
        return self._admins is not None

    def administrator(self, metadata: Mapping[str, str], peer: str) -> str:
        """Returns the name of one who may change the cluster. Raises Forbidden, Overloaded."""
        if self._admins is None:
            raise Forbidden("nobody may change this cluster by a call: it has no admin keys (admin_keys_file)")
        name = self._admin_name(metadata)
        if not name:
            self._keyless.count(host_of(metadata, peer))
            raise Forbidden("only an admin key allows changes of the cluster: send one as authorization: Bearer KEY")
        return name

    @contextmanager
    def watcher(self, metadata: Mapping[str, str], peer: str) -> Iterator[str]:
        """Counts a call that follows the cluster while it is open; yields its client. Raises as `identify`."""
        client = self.identify(metadata, peer)
        with self._watchers.open(host_of(metadata, peer) if self._keys is None else client):
            yield client

    @contextmanager
    def call(self, metadata: Mapping[str, str], peer: str) -> Iterator[str]:
        """Counts a call while it is open; yields its client. Raises as `identify`."""
        client = self.identify(metadata, peer)
        if self._num_calls >= self._max_calls:
            raise Overloaded.later(f"this ingress has {self._max_calls} requests, as many as it takes", RETRY_S)
        with self._within_limits(client):
            self._num_calls += 1
            try:
                yield client
            finally:
                self._num_calls -= 1

    def _within_limits(self, client: str) -> AbstractContextManager[None]:
        """Counts a request of the client's key while it is open."""
        if self._keys is None:
            return nullcontext()
        if self._admins is not None and client.startswith(ADMIN):
            return self._admins.admitted(client.removeprefix(ADMIN))
        return self._keys.admitted(client)

    def at_a_time(self) -> int:
        """How many generations one call may have at a time; it makes further ones when these have ended."""
        return self._places.of_a_call()

    def generation(self, client: str, *, accepted: bool = False, goes_on: bool = False) -> AbstractContextManager[None]:
        """Counts a generation while it is open. Raises Unavailable while draining, Overloaded without room.

        accepted: before; draining does not refuse it.  goes_on: it follows one of the same call; nothing refuses it.
        """
        return self._places.taken(client, accepted=accepted, goes_on=goes_on)

    def spend(self, client: str, num_tokens: int) -> None:
        """Charges a client's key with the tokens of a generation, prompt and answer, once it has ended."""
        if self._keys is not None:
            self._keys.spend(client, num_tokens)

    def question(self, metadata: Mapping[str, str], peer: str) -> None:
        """Counts a short call that needs no key. Raises Forbidden, Overloaded."""
        self._check_peer(peer)
        self._questions.ask(host_of(metadata, peer))

    @contextmanager
    def watch(self, metadata: Mapping[str, str], peer: str) -> Iterator[Callable[[int], None]]:
        """Counts a call that needs no key while it is open. Raises Forbidden, Overloaded.

        Yields a function that counts a message of the call as so many calls; it raises Overloaded.
        """
        self._check_peer(peer)
        host = host_of(metadata, peer)
        with self._keyless.open(host):
            yield lambda calls: self._keyless.count(host, calls)

    def _check_peer(self, peer: str) -> None:
        if self._local_only and not is_local(peer):
            raise Forbidden("this port is for the proxy of its machine only: call the served one")
