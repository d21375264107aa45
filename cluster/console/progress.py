"""Draws the progress of a start, and of anything that counts."""

import time
from collections.abc import Callable
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cluster.drawing import bars
from cluster.status import ClusterStatus

LINE_INTERVAL_S = 10.0  # between two plain lines


class LoadProgress:
    """A line for the start and one for each process that loads weights, from `start` to the end of the block; a plain
    line for each new state where no bar can be drawn."""

    def __init__(self, title: str) -> None:
        self._progress = bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
        )
        self._title = title
        self._started = False
        self._states: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        self._progress.start()
        self._started = True
        self._progress.console.print(self._title)

    def __exit__(self, *exc_info: object) -> None:
        if self._started:  # else it would print an empty line
            self._progress.stop()

    def update(self, status: ClusterStatus) -> None:
        """May be called from another thread."""
        for shard in status.shards:
            loaded = (
                shard.total_bytes if shard.state == "up" else shard.loaded_bytes
            )  # the state may say up before the last bytes are counted
            self._show(
                f"expert shard {shard.shard_id}: {shard.state}",
                f"shard-{shard.shard_id}",
                loaded,
                shard.total_bytes,
            )
        for replica in status.replicas:
            state = "up" if replica.loaded_bytes == replica.total_bytes else "loading"
            self._show(f"attention replica: {state}", replica.name, replica.loaded_bytes, replica.total_bytes)

    def _show(self, description: str, key: str, loaded: int, total: int) -> None:
        if self._progress.disable and self._states.get(key) != description:
            self._states[key] = description
            self._progress.console.print(description, highlight=False)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=None)
        self._progress.update(self._tasks[key], description=description, completed=loaded, total=total or None)


class CountProgress:
    """One line with a bar and a count, from the first update to the end of the block; a plain line now and then where
    no bar can be drawn.

    unit: of the count; bytes are shown as KB, MB and so on.
    """

    def __init__(self, title: str, unit: str = "bytes", clock: Callable[[], float] = time.monotonic) -> None:
        counts = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        self._progress = bars(TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
        self._title, self._unit, self._clock = title, unit, clock
        self._shown_s = clock()
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def update(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task(self._title, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
        if self._progress.disable and self._clock() - self._shown_s >= LINE_INTERVAL_S:
            self._shown_s = self._clock()
            self._progress.console.print(f"{self._title}: {done:,} of {total:,} {self._unit}", highlight=False)
