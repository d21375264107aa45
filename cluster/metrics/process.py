"""One process's part of a node's metrics: its registry and its files. Knows no metric and no collector.

Under `PROMETHEUS_MULTIPROC_DIR` prometheus_client keeps every value in files that it maps into memory, one
for each type and process: `counter_<owner>.db`, `histogram_<owner>.db`, `gauge_<mode>_<owner>.db`. The
library's owner is the pid; a process that got a dead one's pid would go on with its gauges. Ours is
`<pid>-<start>`, which no two processes of one boot share. Linux only: the start is read from /proc.
"""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, values
from prometheus_client.values import MultiProcessValue

from cluster.private import private_folder
from cluster.process_identity import identity

_DIR_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def multiprocess_env(multiproc_dir: Path) -> dict[str, str]:
    """Returns the variables with which a process's metrics reach the collector of `multiproc_dir`."""
    return {_DIR_VARIABLE: str(multiproc_dir)}


def new_registry() -> CollectorRegistry:
    """Returns an empty registry, in multiprocess mode where `PROMETHEUS_MULTIPROC_DIR` is set.

    Call it once a process, before the first metric is made, and hand the registry down: the same metric in
    two registries of one process would overwrite its own counts. Creates the directory. Raises SetupError for
    another user's.
    """
    directory = os.environ.get(_DIR_VARIABLE)
    if directory:
        private_folder(Path(directory))
        # prometheus_client offers no argument for this. Twice would put two writers on one file.
        if not isinstance(getattr(values.ValueClass, "owner", None), ProcessOwner):
            owner = ProcessOwner()
            value_class = MultiProcessValue(owner)  # type: ignore[no-untyped-call]
            value_class.owner = owner
            values.ValueClass = value_class
    return CollectorRegistry()


def exemplars_path() -> Path | None:
    """Where this process keeps its exemplars (`exemplars.py`); None without `PROMETHEUS_MULTIPROC_DIR`."""
    directory = os.environ.get(_DIR_VARIABLE)
    return Path(directory) / f"exemplars_{ProcessOwner()()}.json" if directory else None


class ProcessOwner:
    """A call returns `<pid>-<start ticks>` of this process, also after a fork; each count asks."""

    def __init__(self) -> None:
        self._pid = -1
        self._name = ""

    def __call__(self) -> str:
        pid = os.getpid()
        if pid != self._pid:
            self._name = f"{pid}-{identity(pid)[1]}"
            self._pid = pid
        return self._name


def is_running(pid: int, start_ticks: int | None) -> bool:
    """Whether the process that started at `start_ticks` (None: any of that pid) runs; a zombie does not."""
    started = identity(pid)[1]
    return started != "" and start_ticks in (None, int(started))
