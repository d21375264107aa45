"""Does one piece of work after the other in a thread; waiting clients take turns. Does not know what the work is."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cluster.errors import Overloaded

T = TypeVar("T")

RETRY_S = 1.0


class Lane:
    """For one event loop. name: of the pieces of work, for refusals.  max_waiting: pieces of work; 0 lets none wait.

    When it is full, the client with the most waiting loses its latest to one that has at least two fewer.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._busy = False
        self._turns: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first client's turn is next

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._turns.values()))

    async def run(self, work: Callable[[], T], client: str = "") -> T:
        """Returns the outcome of `work`. Raises Overloaded. A call that is cancelled before its turn leaves nothing."""
        if self._busy:
            await self._turn(client)
        self._busy = True
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
        except BaseException:
            self._pass_on()
            raise
        running.add_done_callback(self._done)
        return await asyncio.shield(running)  # a thread cannot be stopped: the next turn comes at its end

    async def _turn(self, client: str) -> None:
        """Waits for the client's turn. The call before hands it on itself, so that no third call takes it."""
        self._make_room(client)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(client, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()  # it was cancelled just when its turn came
            else:
                self._forget(client, turn)
            raise

    def _make_room(self, client: str) -> None:
        if self.num_waiting < self._max_waiting:
            return
        full = Overloaded.later(f"{self._max_waiting} {self._name} wait already", RETRY_S)
        greediest = max(self._turns, key=lambda name: len(self._turns[name]), default=client)
        turns = self._turns.get(greediest, deque())
        if len(turns) < len(self._turns.get(client, ())) + 2:
            raise full
        latest = turns[-1]
        self._forget(greediest, latest)
        latest.set_exception(full)

    def _done(self, running: asyncio.Future[Any]) -> None:
        if not running.cancelled():
            running.exception()  # read, so that asyncio does not report it: its caller may be gone
        self._pass_on()

    def _pass_on(self) -> None:
        """Gives the turn to the next client, if one waits."""
        while self._turns:
            client, turns = next(iter(self._turns.items()))
            turn = turns[0]
            self._turns.move_to_end(client)
            self._forget(client, turn)
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._turns.get(client, deque())
        if turn in turns:
            turns.remove(turn)
        if not turns:
            self._turns.pop(client, None)
