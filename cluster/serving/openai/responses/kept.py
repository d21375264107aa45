"""Keeps responses in this process, bounded in bytes, number and age."""

import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.errors import NotFound, Overloaded
from cluster.serving.openai.responses.store import (
    FOLLOW_S,
    ID,
    LOST_S,
    Contents,
    Page,
    Progress,
    Reply,
    StoredResponse,
    StoreLimits,
)

RETRY_S = 5.0
RECORD_BYTES = 2000  # of a response beside its texts, about
PART_BYTES = 16 << 20  # of a store's contents that travel at once, about
Reason = Literal["age", "room"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """num_running: of the responses kept, those that some process goes on with."""

    num_kept: int
    num_bytes: int
    num_running: int


@dataclass(slots=True)
class _Kept:
    """One response here, with what changes."""

    stored: StoredResponse
    made_at: float
    heard_at: float
    events: list[str]
    num_bytes: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def whole(self) -> StoredResponse:
        """With its events."""
        return self.stored if self.stored.events is None else replace(self.stored, events=tuple(self.events))

    def tell(self) -> None:
        """Wakes all that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class KeptResponses:
    """A `ResponseStore`. Not thread-safe. clock: monotonic seconds.  on_evict: learns why a response went, of each."""

    def __init__(
        self,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_evict: Callable[[Reason], None] = lambda reason: None,
    ) -> None:
        self.limits, self._clock, self._on_evict = limits or StoreLimits(), clock, on_evict
        self._id = uuid.uuid4().hex
        self._kept: dict[str, _Kept] = {}  # oldest first
        self._num_bytes = 0

    async def put(self, stored: StoredResponse) -> str:
        self._drop(stored.response_id)
        self._check_room(_size(stored), running=stored.running)
        self._add(stored, made_at=self._clock())
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

    def usage(self) -> Usage:
        """Of this moment: what is too old has gone."""
        self._evict()
        return Usage(
            num_kept=len(self._kept),
            num_bytes=self._num_bytes,
            num_running=sum(self._runs(kept) for kept in self._kept.values()),
        )

    def contents(self) -> Iterator[Contents]:
        """Yields all of it in parts, the first one in any case. Nothing may change meanwhile."""
        now, part, num_bytes = self._clock(), list[_Kept](), 0
        for kept in self._kept.values():
            if part and num_bytes + kept.num_bytes > PART_BYTES:
                yield self._part(part, now)
                part, num_bytes = [], 0
            part.append(kept)
            num_bytes += kept.num_bytes
        yield self._part(part, now)

    def _part(self, part: Sequence[_Kept], now: float) -> Contents:
        return Contents(
            store_id=self._id,
            limits=self.limits,
            responses=tuple(kept.whole() for kept in part),
            ages_s=tuple(now - kept.made_at for kept in part),
        )

    def take(self, contents: Contents) -> None:
        """Goes on as the store did that had these: its running responses have as long as new ones to report."""
        self._id, self.limits = contents.store_id, contents.limits
        for stored, age_s in zip(contents.responses, contents.ages_s, strict=True):
            self._add(stored, made_at=self._clock() - age_s)

    def _add(self, stored: StoredResponse, *, made_at: float) -> None:
        plain = stored if stored.events is None else replace(stored, events=())
        kept = _Kept(plain, made_at, self._clock(), list(stored.events or ()), _size(stored))
        self._kept[stored.response_id] = kept
        self._num_bytes += kept.num_bytes

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
            raise NotFound(f"Response with id {response_id[:100]!r} not found: it was never kept, or is gone", ID)
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
            reason: Reason = "age"
            if self._num_bytes > limits.max_bytes or len(self._kept) > limits.max_responses:
                victim, reason = next((kept for kept in self._kept.values() if not self._runs(kept)), victim), "room"
            elif now - victim.made_at <= limits.max_age_s:
                return
            self._drop(victim.stored.response_id)
            self._on_evict(reason)

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id, None)
        if kept is not None:
            self._num_bytes -= kept.num_bytes
            kept.tell()


def _size(stored: StoredResponse) -> int:
    return RECORD_BYTES + _num_bytes(stored.response, stored.items, *stored.events or ())


def _num_bytes(*texts: str) -> int:
    """Of texts as this process holds them."""
    return sum(map(sys.getsizeof, texts))
