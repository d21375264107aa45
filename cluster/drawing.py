"""Consoles and bars on stderr, for all that draws there. Knows nothing that is drawn."""

import os
import re
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

UNBROKEN = 10_000  # columns


class OutputConsole(Console):
    """Breaks lines at the width of a terminal, or of $COLUMNS, and none in a pipe or a file, where programs read them.
    Raises for a reader that has gone, as `print` does; the command line handles it.
    """

    def __init__(self, *, stderr: bool = False, highlight: bool = True, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, highlight=highlight, file=file)
        if not self.is_terminal and not os.environ.get("COLUMNS"):
            self.width = UNBROKEN

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, but a drawing in a pipe or a file has no spaces at its lines' ends."""
        if self.is_terminal or all(isinstance(each, str) for each in objects):  # texts stay as they are
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))
        self.file.flush()

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def moves(console: Console) -> bool:
    """Whether a console is a terminal on which a line may be drawn again: none that is a pipe, dumb, or of a user who
    sets NO_COLOR."""
    return console.file.isatty() and not console.is_dumb_terminal and not console.no_color


def bars(*columns: ProgressColumn) -> Progress:
    """Bars on stderr; disabled where they cannot be drawn again. columns: none for rich's usual ones."""
    console = OutputConsole(stderr=True)
    # redirect_stdout: else what is printed to a file comes here
    return Progress(*columns, console=console, redirect_stdout=False, disable=not moves(console))
