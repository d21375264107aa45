"""Where responses are kept after their calls, and while nobody waits for them. Knows no Ray and no HTTP.

A response is two JSON texts and the events of its stream; what stands in them is the front's business. Only the client
that made a response gets it back. `ResponseStore` is the seam: `KeptResponses` keeps them in this process, and
`runtime/front/response_store.py` puts one of these into a process that all ingresses ask.
"""

import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.errors import NotFound, Overloaded
from cluster.evolving import evolving

FOLLOW_S = 10.0  # in which a question for more events is answered, with or without
LOST_S = 30.0  # a running response of which nothing is heard for so long has lost its process
RETRY_S = 5.0
RECORD_BYTES = 2000  # of a response beside its texts, about
_ID = "response_id"
_WIRE = "cluster.serving.openai.responses.store"


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """The oldest response goes when there are more."""

    max_bytes: int = 256 << 20
    max_responses: int = 10_000
    max_age_s: float = 86_400.0


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """response, items: JSON; items is the conversation that the response answers.
    events: the texts of its stream's events but the last; None: it is no stream. `get` gives none: `follow` does.
    running: some process goes on with it.  ending: "cancelled" or "lost" where the store knows it, the text may not.
    """

    response_id: str
    client: str
    response: str
    items: str
    events: tuple[str, ...] | None = None
    running: bool = False
    ending: str = ""


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running response is. events: those from `first` on; the store may have some of them."""

    response_id: str
    response: str
    first: int = 0
    events: tuple[str, ...] = ()
    ended: bool = False


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """store_id: another one when another store answers, which knows nothing of what was told to the one before.
    stop: responses that nobody wants any more.
    """

    store_id: str
    stop: tuple[str, ...] = ()


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Events of a stream from a place on; none: nothing came for a while.

    num_events: of the stream so far.  ended: there will be no more.
    """

    events: tuple[str, ...]
    num_events: int
    ended: bool


class ResponseStore(Protocol):
    """Every method may raise Unavailable. NotFound: it is not there, or another client's."""

    async def put(self, stored: StoredResponse) -> str:
        """Keeps a response; returns the store's id. Raises Overloaded when running ones fill the store."""

    async def get(self, response_id: str, client: str) -> StoredResponse:
        """Raises NotFound."""

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        """Returns the events from `first` on as soon as there are some. Raises NotFound."""

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        """Ends a running response; one that has ended stays as it is. Raises NotFound."""

    async def delete(self, response_id: str, client: str) -> None:
        """Raises NotFound."""

    async def report(self, news: Sequence[Progress]) -> Reply:
        """Takes note of running responses: call it for each every few seconds, also without news."""


@dataclass(slots=True)
class _Kept:
    """One response here, with what changes."""

    stored: StoredResponse
    made_at: float
    heard_at: float
    events: list[str]
    num_bytes: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wakes all that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class KeptResponses:
    """A `ResponseStore` in this process. Not thread-safe. clock: monotonic seconds."""

    def __init__(self, limits: StoreLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits or StoreLimits(), clock
        self._id = uuid.uuid4().hex
        self._kept: dict[str, _Kept] = {}  # oldest first
        self._num_bytes = 0

    async def put(self, stored: StoredResponse) -> str:
        self._drop(stored.response_id)
        now, events = self._clock(), list(stored.events or ())
        num_bytes = RECORD_BYTES + _num_bytes(stored.response, stored.items, *events)
        self._check_room(num_bytes, running=stored.running)
        plain = stored if stored.events is None else replace(stored, events=())
        self._kept[stored.response_id] = _Kept(plain, now, now, events, num_bytes)
        self._num_bytes += num_bytes
        self._evict()
        return self._id

    async def get(self, response_id: str, client: str) -> StoredResponse:
        return self._now(self._find(response_id, client))

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        with suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_S):
                while True:
                    kept = self._find(response_id, client)
                    if len(kept.events) > first or not self._runs(kept):
                        break
                    await kept.changed.wait()
        kept = self._find(response_id, client)
        return Page(events=tuple(kept.events[first:]), num_events=len(kept.events), ended=not self._runs(kept))

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        kept = self._find(response_id, client)
        if self._runs(kept):
            kept.stored = replace(kept.stored, running=False, ending="cancelled")
            kept.tell()
        return self._now(kept)

    async def delete(self, response_id: str, client: str) -> None:
        self._find(response_id, client)
        self._drop(response_id)

    async def report(self, news: Sequence[Progress]) -> Reply:
        stop = [each.response_id for each in news if not self._note(each)]
        self._evict()
        return Reply(store_id=self._id, stop=tuple(stop))

    def _note(self, news: Progress) -> bool:
        """Returns whether the response is still wanted. One that was cancelled takes its text, and no more events."""
        kept = self._kept.get(news.response_id)
        if kept is None:
            return False
        kept.heard_at = self._clock()
        wanted, more = kept.stored.running, _num_bytes(news.response) - _num_bytes(kept.stored.response)
        if wanted:
            more += _num_bytes(*news.events) - _num_bytes(*kept.events[news.first :])
            kept.events[news.first :] = news.events
        kept.stored = replace(kept.stored, response=news.response, running=wanted and not news.ended)
        kept.num_bytes += more
        self._num_bytes += more
        if wanted and (news.events or news.ended):
            kept.tell()
        return wanted

    def _find(self, response_id: str, client: str) -> _Kept:
        self._evict()
        kept = self._kept.get(response_id)
        if kept is None or kept.stored.client != client:
            raise NotFound(f"Response with id {response_id[:100]!r} not found: it was never kept, or is gone", _ID)
        return kept

    def _runs(self, kept: _Kept) -> bool:
        return kept.stored.running and self._clock() - kept.heard_at <= LOST_S

    def _now(self, kept: _Kept) -> StoredResponse:
        """A response as it is at this moment."""
        lost = kept.stored.running and not self._runs(kept)
        return replace(kept.stored, running=False, ending="lost") if lost else kept.stored

    def _check_room(self, num_bytes: int, *, running: bool) -> None:
        """Raises Overloaded for one that does not fit in, a running one also for one that does not fit beside the
        others that run."""
        others = [kept.num_bytes for kept in self._kept.values() if self._runs(kept)] if running else []
        limits = self.limits
        if len(others) >= limits.max_responses or sum(others) + num_bytes > limits.max_bytes:
            raise Overloaded.later("the store of responses has no room for this one", RETRY_S)

    def _evict(self) -> None:
        """Drops what is too old or too much: the oldest first, running ones after all others."""
        limits, now = self.limits, self._clock()
        while self._kept:
            victim = next(iter(self._kept.values()))
            if self._num_bytes > limits.max_bytes or len(self._kept) > limits.max_responses:
                victim = next((kept for kept in self._kept.values() if not self._runs(kept)), victim)
            elif now - victim.made_at <= limits.max_age_s:
                return
            self._drop(victim.stored.response_id)

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id, None)
        if kept is not None:
            self._num_bytes -= kept.num_bytes
            kept.tell()


class NoStore:
    """A `ResponseStore` that keeps nothing."""

    async def put(self, stored: StoredResponse) -> str:
        raise self._refusal()

    async def get(self, response_id: str, client: str) -> StoredResponse:
        raise self._refusal()

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        raise self._refusal()

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        raise self._refusal()

    async def delete(self, response_id: str, client: str) -> None:
        raise self._refusal()

    async def report(self, news: Sequence[Progress]) -> Reply:
        raise self._refusal()

    def _refusal(self) -> NotFound:
        return NotFound("this server keeps no responses: stored_responses is 0", _ID)


def _num_bytes(*texts: str) -> int:
    """Of texts as this process holds them."""
    return sum(map(sys.getsizeof, texts))
