"""Shows on stderr that a command is at work: a spinner on a terminal, plain lines elsewhere. Knows no command."""

import os
import sys
import threading
from collections.abc import Iterator
from typing import Self, TextIO, TypeVar

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.drawing import OutputConsole, moves

DELAY_S = 1.0  # a command that is through sooner shows nothing
Piece = TypeVar("Piece")


class Working:
    """A context manager. Its line appears when the block takes longer than delay_s, and goes with the block's end.

    Where nothing can be drawn again, a terminal gets the words once, and new words are lines of their own; a pipe gets
    the new words alone, so that a script's stderr has news and nothing else. Not for a block that draws itself.
    """

    def __init__(self, words: str, *, delay_s: float = DELAY_S) -> None:
        self._words = words
        self._lock = threading.Lock()
        self._timer = threading.Timer(delay_s, self._show)
        self._timer.daemon = True
        self._out = _stderr()
        self._console = OutputConsole(file=self._out)
        self._progress: Progress | None = None
        self._ended = False

    def say(self, words: str) -> None:
        """Shows other words from now on. May be called from another thread."""
        with self._lock:
            self._words = words
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], description=words)
            elif not moves(self._console):
                self._line(words)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._progress is not None:
                self._progress.stop()
            if self._out is not sys.stderr:
                self._out.close()

    def _show(self) -> None:
        with self._lock:
            if self._ended:
                return
            if not moves(self._console):
                if self._out.isatty():
                    self._line(self._words)
                return
            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            self._progress = Progress(
                *columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._progress.add_task(self._words, total=None)
            self._progress.start()

    def _line(self, words: str) -> None:
        try:
            print(words, file=self._out, flush=True)
        except (OSError, ValueError):  # nobody reads it
            return


def awaited(pieces: Iterator[Piece], words: str) -> Iterator[Piece]:
    """Yields the pieces; shows the words until the first one is there."""
    with Working(words):
        first = list(_first(pieces))
    yield from first
    yield from pieces


def _first(pieces: Iterator[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        return


def _stderr() -> TextIO:
    """A stream to where stderr goes now, whatever it is redirected to meanwhile (`terminal.bounded`)."""
    try:
        err = sys.stderr
        return os.fdopen(os.dup(err.fileno()), "w", encoding=err.encoding, errors=err.errors)
    except (AttributeError, OSError, ValueError):  # another object, as in tests, or closed
        return sys.stderr
