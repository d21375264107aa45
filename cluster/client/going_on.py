"""An answer that outlives its connections: asked for again behind the tokens that have come. Knows no protocol."""

import secrets
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cluster.errors import Overloaded, Unavailable
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


def going_on(
    ask: Ask[P],
    *,
    again: Callable[[Unavailable], bool],
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[P, None, None]:
    """Yields the pieces of one answer, however many streams they take.

    ask: a stream of the answer behind these tokens; it raises Unavailable where it ends before the answer.
    again: whether an answer of which nothing has come is asked for again after this error.
    Raises what `ask` raises: Unavailable and Overloaded after `patience_s` without a token, or where nothing has come
    yet and it shall not be asked again.
    """
    received: list[int] = []
    begun = finished = False
    wait_s, until = FIRST_WAIT_S, clock() + patience_s
    while True:
        try:
            with closing(ask(tuple(received))) as pieces:
                for piece in pieces:
                    received += piece.token_ids
                    begun, finished = True, bool(piece.finish_reason)
                    wait_s, until = FIRST_WAIT_S, clock() + patience_s
                    yield piece
            return
        except (Unavailable, Overloaded) as error:
            if finished:
                return
            begun = begun or (isinstance(error, Unavailable) and again(error))
            pause_s = max(wait_s, error.retry_after_s if isinstance(error, Overloaded) else 0.0)
            if not begun or clock() + pause_s > until:
                raise
            sleep(pause_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
