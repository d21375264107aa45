"""Shares one reader among all watchers of an ingress. Nothing is read while nobody watches.

A frame's texts are made once for all. A watcher that is slow gets the latest frame when it asks, never a queue.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, Unavailable
from cluster.serving.live.beat import BeatMaker
from cluster.serving.live.events import Events
from cluster.serving.live.picture import cluster_picture, placement_picture
from cluster.serving.live.reading import LiveSource
from cluster.status import ClusterStatus

log = logging.getLogger(__name__)

PERIOD_S = 0.5
FRAME_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """JSON texts: of a `ClusterPicture`, a `PlacementPicture` ("null" without a plan) and a `Beat`."""

    number: int
    cluster: str
    placement: str
    beat: str


class LiveFeed:
    """For one event loop. model: the name that clients see.  wall_clock: seconds since 1970."""

    def __init__(
        self,
        source: LiveSource,
        model: str,
        *,
        period_s: float = PERIOD_S,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._source, self._model, self._period_s, self._wall_clock = source, model, period_s, wall_clock
        self._events = Events()
        self._beats = BeatMaker()
        self._latest: Frame | None = None
        self._placement = -1, "null"
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self.num_watchers = 0

    def observe(self, status: ClusterStatus) -> None:
        """Takes note of a status that was read anyway."""
        self._events.observe(status, self._wall_clock())

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """The latest frame and each one that is new when the watcher comes back for it. Raises Unavailable when none
        comes."""
        self.num_watchers += 1
        if self._reader is None:
            self._latest, self._beats = None, BeatMaker()
            self._reader = asyncio.create_task(self._read())
        try:
            seen = 0
            while True:
                frame = await self._newer(seen)
                seen = frame.number
                yield frame
        finally:
            self.num_watchers -= 1

    async def now(self) -> Frame:
        """One frame. Raises Unavailable."""
        frames = self.frames()
        try:
            return await anext(frames)
        finally:
            await frames.aclose()

    async def _newer(self, seen: int) -> Frame:
        try:
            async with asyncio.timeout(FRAME_S):
                while self._latest is None or self._latest.number <= seen:
                    news = self._news
                    await news.wait()
        except TimeoutError:
            raise Unavailable("the cluster gives no word of itself: try again") from None
        return self._latest

    async def _read(self) -> None:
        """Ends when the last watcher has left."""
        number = 0
        try:
            while self.num_watchers:
                number += 1
                try:
                    self._latest = await self._frame(number)
                except ClusterError as error:
                    log.info("no frame of the cluster: %s", error)
                except Exception:  # the top of a loop: the next reading may fit together again
                    log.exception("a frame of the cluster failed")
                else:
                    news, self._news = self._news, asyncio.Event()
                    news.set()
                await asyncio.sleep(self._period_s)
        finally:
            self._reader = None

    async def _frame(self, number: int) -> Frame:
        reading = await self._source.read()
        status = reading.status
        if status.plan is not None and self._placement[0] != status.epoch:
            self._placement = status.epoch, _json(placement_picture(status.plan))
        return Frame(
            number=number,
            cluster=_json(cluster_picture(status, self._model, self._events.latest)),
            placement=self._placement[1],
            beat=_json(self._beats.beat(reading)),
        )


def _json(picture: Any) -> str:
    return json.dumps(dataclasses.asdict(picture), separators=(",", ":"), ensure_ascii=False)
