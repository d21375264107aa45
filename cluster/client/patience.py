"""Asks again where a busy server says when. Knows no server."""

import time
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import Overloaded

PATIENCE_S = 600.0

Given = TypeVar("Given")
Answer = TypeVar("Answer")


def patient(
    call: Callable[[Given], Answer],
    *,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[Given], Answer]:
    """The call, made again after Overloaded as soon as the server's hint says. It may come from several threads.

    Raises Overloaded where `patience_s` would be over by then, and for an answer without a hint.
    """

    def ask(given: Given) -> Answer:
        until = clock() + patience_s
        while True:
            try:
                return call(given)
            except Overloaded as error:
                if clock() + error.retry_after_s > until:
                    raise
                sleep(error.retry_after_s)

    return ask
