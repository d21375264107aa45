"""Shows that the hub is asked, on a terminal, and how far downloads are: a bar there, else a line now and then. Fetches
nothing."""

import io
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, tqdm

from cluster.checkpoint.hub.name import HubName

log = logging.getLogger(__name__)

TENTH_INTERVAL_S, LINE_INTERVAL_S = 2.0, 15.0  # between two lines: if a tenth more is through, and in any case
ASKING_DELAY_S = 1.0  # a hub that answers sooner shows nothing


def asking(name: HubName) -> AbstractContextManager[object]:
    """Around questions to the hub. Not around a download, which shows itself."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    from cluster.working import Working  # rich loads with it: not in a server's processes

    return Working(f"asking the hub about {name} …", delay_s=ASKING_DELAY_S)


class Stopped(Exception):
    """Ends a download whose caller has gone."""


class Progress:
    """Bytes of one or several downloads, counted from any threads.

    report: called with the bytes of each piece.
    """

    def __init__(
        self, title: str, total_bytes: int, report: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._title, self._total, self._report, self._clock = title, total_bytes, report, clock
        self._lock = threading.Lock()
        self._done, self._shown_tenths, self._shown_at = 0, 0, clock()
        self._stopped = False
        self._bar: Any = None
        self._out = sys.stderr or io.StringIO()  # a process may have none
        if self._out.isatty():
            self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True)  # type: ignore[no-untyped-call]

    def add(self, num_bytes: int) -> None:
        """Raises Stopped after `stop`."""
        with self._lock:
            if self._stopped:
                raise Stopped
            self._done += num_bytes
            if self._report is not None:
                self._report(num_bytes)
            if self._bar is not None:
                self._bar.update(num_bytes)
            elif not are_progress_bars_disabled():
                self._show_line()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show_line(self) -> None:
        tenths = 10 * self._done // max(1, self._total)
        now = self._clock()
        if now - self._shown_at < (LINE_INTERVAL_S if tenths == self._shown_tenths else TENTH_INTERVAL_S):
            return
        self._shown_tenths, self._shown_at = tenths, now
        line = f"{self._title}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        if log.isEnabledFor(logging.INFO):
            log.info("%s", line)
        else:  # nobody has set logging up: the line goes where the bar would be
            self._out.write(f"{line}\n")


class Silent(tqdm):
    """Draws nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


class FileProgress:
    """One file's part of a `Progress`: as many bytes as it has, whichever way they come."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._total, self._counted = progress, total_bytes, 0

    def add(self, num_bytes: int) -> None:
        num_bytes = min(num_bytes, self._total - self._counted)
        self._counted += num_bytes
        self._progress.add(num_bytes)

    def finish(self) -> None:
        """Counts the bytes that this process did not see: another one had fetched them."""
        self.add(self._total)

    def bar(self) -> type[Any]:
        """The `tqdm_class` for the library's download of this file. It draws nothing."""
        count = self.add

        class Bar(Silent):
            def update(self, n: float | None = 1) -> None:
                count(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                """With it, Xet's downloads have one bar: that of the bytes that are in the file."""

            def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None: ...

        return Bar
