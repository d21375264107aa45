"""Runs a command with streams that may be broken, arguments in any encoding, and a bound for calls that may hang.

A command reads and prints as if all were well. A character that the terminal's encoding lacks is drawn in ASCII here, a
reader that has gone ends the command quietly, an output that cannot be written becomes one line on stderr.
"""

import codecs
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from cluster.errors import SetupError

READER_GONE = 141  # a shell shows this for a command that SIGPIPE has ended
MAX_COMPLAINT_CHARS = 2000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
_WRONG_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # an argument's fault, wherever it is met
_ASCII = dict(zip("▁▂▃▄▅▆▇█━╸╺", ".:-=+*%#---", strict=True)) | {"…": "...", "\u2013": "-", "\u00d7": "x"}


def run(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code, once its output is written."""
    _prepare()
    try:
        code = command()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        code = READER_GONE
    except UnicodeError as error:
        complain(f"a text does not fit this locale's encoding ({error}): set LC_ALL=C.UTF-8")
        code = 2
    except OSError as error:
        code = _failed(error)
    return _flushed(code)


def complain(message: object) -> None:
    """Prints one line on stderr, if that is possible."""
    with suppress(OSError, ValueError):
        text = " ".join(str(message).split())
        if len(text) > MAX_COMPLAINT_CHARS:  # it repeats a huge argument; the advice is at its end
            text = f"{text[: MAX_COMPLAINT_CHARS // 2]} … {text[-MAX_COMPLAINT_CHARS // 2 :]}"
        print(f"moe-cluster: {text}", file=sys.stderr, flush=True)


def utf8(text: str, what: str) -> str:
    """Returns a text; bytes that the locale's encoding lacks are tried as UTF-8. what: its name. Raises SetupError."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise SetupError(f"{what} is not valid UTF-8 at byte {error.start}: give it as UTF-8") from None
    except UnicodeEncodeError as error:
        raise SetupError(f"{what} has half a character at position {error.start}: give it as UTF-8") from None


def arguments(given: Sequence[str]) -> list[str]:
    """Raises SetupError for an argument that is no text."""
    return [utf8(argument, f"argument {number}") for number, argument in enumerate(given, 1)]


@contextmanager
def bounded(seconds: float, message: str) -> Iterator[None]:
    """Ends this process with `message` if the block takes longer, and hides anything that the block writes to stderr.

    For calls that Python cannot interrupt. Use it only while nothing runs that must be stopped.
    """
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    shown = os.dup(2)

    def end() -> None:
        with suppress(OSError):
            # on a terminal a line may be drawn, and the cursor hidden (`console.Working`)
            wiped = "\r\x1b[2K\x1b[?25h" if os.isatty(shown) else ""
            os.write(shown, f"{wiped}moe-cluster: {message}\n".encode("ascii", "backslashreplace"))
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        timer.cancel()
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)


def _prepare() -> None:
    """Opens closed streams, and gives the others an encoding in which no character raises."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: else a socket or a file would become stdout
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    codecs.register_error("moe-cluster-ascii", _in_ascii)
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        *((s, "moe-cluster-ascii") for s in (sys.stdout, sys.stderr)),
    ):
        with suppress(AttributeError, OSError, ValueError):  # it is another object, or was read from
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(char, "?") for char in error.object[error.start : error.end]), error.end


def _failed(error: OSError) -> int:
    where = f"{error.filename}: " if error.filename else "the output cannot be written: " * (error.errno in _FULL)
    complain(f"{where}{error.strerror or error}")
    return 2 if error.errno in _WRONG_NAME else 1


def _flushed(code: int) -> int:
    """Flushes the streams and returns the exit code; else the interpreter would do it at its end, with a traceback."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or READER_GONE
        except (OSError, ValueError) as error:
            if stream is sys.stdout and isinstance(error, OSError) and not code:
                complain(f"the output cannot be written: {error.strerror}")
            code = code or 1
        else:
            continue
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
    return code
