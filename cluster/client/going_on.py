"""An answer that outlives its connections: asked for again behind the tokens that have come. Knows no protocol."""

import secrets
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cluster.errors import BrokenStream, Overloaded, Unavailable
from cluster.types import SamplingParams

PATIENCE_S = 120.0  # without a token; as of `moe-cluster batch` for a server that is gone
FIRST_WAIT_S, MAX_WAIT_S = 0.05, 2.0  # between two tries; HAProxy is there again after 0.1 s


class Piece(Protocol):
    """A piece of an answer; finish_reason is true with the last one."""

    @property
    def token_ids(self) -> Iterable[int]: ...
    @property
    def finish_reason(self) -> Any: ...


P = TypeVar("P", bound=Piece)
Ask = Callable[[tuple[int, ...]], Generator[P, None, None]]


def seeded(params: SamplingParams) -> SamplingParams:
    """The same with a seed: without one no server could go on with an answer."""
    return params if params.seed is not None else replace(params, seed=secrets.randbits(63))


class Patience:
    """Of one client, whose answers may run in several threads.

    An answer waits for its next token for so many seconds after its stream broke; and none waits for longer after the
    server was first missed, so that a thousand answers do not wait for a dead one in turn.
    """

    def __init__(
        self,
        seconds: float = PATIENCE_S,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._clock, self.sleep = seconds, clock, sleep
        self._missed_at: float | None = None
        self.reached = False  # whether the server has ever answered

    def now(self) -> float:
        return self._clock()

    def heard(self) -> None:
        """Notes that the server answers, if only that it is busy."""
        self.reached, self._missed_at = True, None

    def missed(self) -> None:
        """Notes that the server is missed, by an answer that waits for it."""
        if self._missed_at is None:
            self._missed_at = self._clock()

    def is_over(self, lost_at: float, pause_s: float) -> bool:
        """Whether it ends before a pause that an answer would make whose stream broke then."""
        missed_at = self._missed_at
        since = lost_at if missed_at is None else min(lost_at, missed_at)
        return self._clock() + pause_s > since + self._seconds


def going_on(ask: Ask[P], patience: Patience) -> Generator[P, None, None]:
    """Yields the pieces of one answer, however many streams they take.

    ask: a stream of the answer behind these tokens; it raises Unavailable where it ends before the answer.
    Raises what `ask` raises: Unavailable and Overloaded when patience ends, Overloaded also where nothing was lost, and
    Unavailable where no server was ever reached.
    """
    received: list[int] = []
    lost = finished = False
    wait_s = FIRST_WAIT_S
    lost_at: float | None = None
    while not finished:
        try:
            with closing(ask(tuple(received))) as pieces:
                for piece in pieces:
                    received += piece.token_ids
                    wait_s, lost_at, finished = FIRST_WAIT_S, None, bool(piece.finish_reason)
                    patience.heard()
                    yield piece
            if not finished:
                raise BrokenStream("the stream of the answer ended before the answer")
        except (Unavailable, Overloaded) as error:
            if finished:
                return
            hint_s = error.retry_after_s if isinstance(error, Overloaded) else None
            lost = lost or isinstance(error, BrokenStream) or (hint_s is None and patience.reached)
            if not lost:
                raise
            lost_at = patience.now() if lost_at is None else lost_at
            if hint_s is None:
                patience.missed()
            else:
                patience.heard()
            pause_s = max(wait_s, hint_s or 0.0)
            if patience.is_over(lost_at, pause_s):
                raise
            patience.sleep(pause_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
