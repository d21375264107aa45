"""Draws the progress of a start, and of anything that counts."""

from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cluster.console.base import OutputConsole
from cluster.status import ClusterStatus


class LoadProgress:
    """A line for the start and one for each process that loads weights, from `start` to the end of the block."""

    def __init__(self, title: str) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(),
            console=OutputConsole(stderr=True),
        )  # fmt: skip
        self._title = title
        self._started = False
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
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=None)
        self._progress.update(self._tasks[key], description=description, completed=loaded, total=total or None)


class CountProgress:
    """One line with a bar and a count, from the first update to the end of the block.

    unit: of the count; bytes are shown as KB, MB and so on.
    """

    def __init__(self, title: str, unit: str = "bytes") -> None:
        counts = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(),
            console=OutputConsole(stderr=True), redirect_stdout=False,  # else what is printed to a file comes here
        )  # fmt: skip
        self._title = title
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
