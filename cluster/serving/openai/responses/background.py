"""The responses of this process: those that nobody waits for run in a task each, and the store learns how far they are.

One report for all of them, a few times a second, says what is new; the reply says what nobody wants any more. A store
that has lost its memory gets all again that runs here.
"""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Protocol

from cluster.errors import ClusterError, Overloaded
from cluster.logs import SeldomLog
from cluster.serving.openai.responses.response_body import ENDED, ResponseBody
from cluster.serving.openai.responses.store import NoStore, Progress, ResponseStore, StoredResponse

log = logging.getLogger(__name__)
seldom = SeldomLog(log)

REPORT_S = 0.25  # between two reports: a cancel takes as long to come through
MAX_RUNNING, MAX_OF_CLIENT = 256, 64  # in the background of one process, waiting ones too
MAX_TRIES = 600  # of one that finds the cluster full, and of reports after an end
RETRY_S = 5.0


class Made(Protocol):
    """One response that is made: `making.Making`."""

    response: ResponseBody
    events: list[str]
    begun: bool

    def fail(self, error: Exception) -> list[str]: ...

    def cancel(self) -> list[str]: ...

    def last_event(self) -> str: ...


class BackgroundResponse:
    """One response in the background.

    begin: begins to make it, and again when the cluster was full before its first token.
    stored: as the store has it at the beginning.
    """

    def __init__(self, made: Made, stored: StoredResponse, begin: Callable[[], AsyncGenerator[str, None]]) -> None:
        self.made, self.begin = made, begin
        self._stored = stored
        self._num_sent = 0
        self._changed = asyncio.Event()
        self.waits = True  # for its place; then admission counts it
        self.store_id = ""
        self.num_reports_after_end = 0

    @property
    def response_id(self) -> str:
        return self._stored.response_id

    @property
    def client(self) -> str:
        return self._stored.client

    @property
    def ended(self) -> bool:
        return self.made.response.status in ENDED

    def tell(self) -> None:
        """Wakes who reads along."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncGenerator[str, None]:
        """Yields all events as they come."""
        num_read = 0
        while True:
            changed, ended = self._changed, self.ended
            for text in self.made.events[num_read:]:
                num_read += 1
                yield text
            if ended:
                yield self.made.last_event()
                return
            if num_read == len(self.made.events):
                await changed.wait()

    def progress(self) -> Progress:
        return Progress(
            response_id=self.response_id,
            response=self.made.response.model_dump_json(),
            first=self._num_sent,
            events=tuple(self.made.events[self._num_sent :]),
            ended=self.ended,
        )

    def reported(self, progress: Progress) -> None:
        """Takes note that the store has got this."""
        self._num_sent = progress.first + len(progress.events)

    def whole(self) -> StoredResponse:
        """All of it, for a store that knows nothing of it."""
        return replace(
            self._stored,
            response=self.made.response.model_dump_json(),
            events=None if self._stored.events is None else tuple(self.made.events),
        )


class Responses:
    """Keeps responses, and runs those in the background. For one event loop.

    store: None keeps none.
    """

    def __init__(self, store: ResponseStore | None) -> None:
        self.store = store or NoStore()
        self.keeps = store is not None
        self._running: dict[str, BackgroundResponse] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._beginning: list[str] = []  # clients of those that the store is about to get
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reporting: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._reports = True  # the last report reached the store
        self._context = contextvars.copy_context()  # tasks of a call's own context would end with the call

    @property
    def num_waiting(self) -> int:
        """Responses in the background that were accepted and have no place yet."""
        return sum(response.waits for response in self._running.values())

    async def keep(self, stored: StoredResponse) -> bool:
        """Returns whether the store took a response that has ended; it never fails its caller."""
        try:
            await self.store.put(stored)
        except ClusterError as error:
            seldom.warning("response %s is not kept: %s", stored.response_id, error)
            return False
        return True

    def keep_later(self, stored: StoredResponse) -> None:
        """As `keep`, of a call that is about to end."""
        self._task(self.keep(stored))

    async def begin(self, response: BackgroundResponse) -> None:
        """Runs a response in the background. Raises Overloaded, Unavailable."""
        clients = [*self._beginning, *(other.client for other in self._running.values())]
        if len(clients) >= MAX_RUNNING or clients.count(response.client) >= MAX_OF_CLIENT:
            raise Overloaded.later("as many responses run in the background as may", RETRY_S)
        self._beginning.append(response.client)
        try:
            response.store_id = await self.store.put(response.whole())
        finally:
            self._beginning.remove(response.client)
        self._running[response.response_id] = response
        self._runs[response.response_id] = self._task(self._run(response))
        if self._reporting is None or self._reporting.done():
            self._reporting = self._task(self._report())

    async def drained(self) -> None:
        """Returns when nothing runs in the background any more, and the store knows it."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, response: BackgroundResponse) -> None:
        made = response.made
        try:
            for remaining in reversed(range(MAX_TRIES)):
                try:
                    response.waits = False
                    async with aclosing(response.begin()) as events:
                        async for _ in events:
                            response.tell()
                    break
                except Overloaded as error:
                    if made.begun or not remaining:
                        raise
                    response.waits = True
                    await asyncio.sleep(error.retry_after_s)
        except asyncio.CancelledError:
            made.cancel()
        except Exception as error:  # noqa: BLE001 the response has it
            made.fail(error)
        response.waits = False
        response.tell()
        self._news.set()

    async def _report(self) -> None:
        while self._running:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._news.wait()
            self._news.clear()
            responses = list(self._running.values())
            try:
                await self._report_once(responses)
                self._reports = True
            except ClusterError as error:
                if self._reports:
                    log.warning("the store does not learn of %d responses: %s", len(responses), error)
                self._reports = False
            for response in responses:
                if response.ended:
                    response.num_reports_after_end += 1
                    if response.num_reports_after_end > MAX_TRIES:
                        self._forget(response)

    async def _report_once(self, responses: list[BackgroundResponse]) -> None:
        """Raises Unavailable, Overloaded."""
        news = [(response, response.progress()) for response in responses]
        reply = await self.store.report([progress for _, progress in news])
        for response, progress in news:
            if reply.store_id != response.store_id:
                await self._put_again(response)
                continue
            response.reported(progress)
            if progress.ended:
                self._forget(response)
            elif response.response_id in reply.stop:
                self._runs[response.response_id].cancel()

    async def _put_again(self, response: BackgroundResponse) -> None:
        """To a store that has lost it. Raises Unavailable; where there is no room, the next report tries again."""
        try:
            response.store_id = await self.store.put(response.whole())
        except Overloaded as error:
            seldom.warning("the store has no room for response %s: %s", response.response_id, error)

    def _forget(self, response: BackgroundResponse) -> None:
        self._running.pop(response.response_id, None)
        self._runs.pop(response.response_id, None)

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
