"""Bounds what a Ray piles up in weeks: its logs, the files of its dead processes, the memory of its GCS.

Measured over 4,000 short requests (Ray 2.60): the GCS grew by 4.2 MB each 1,000 by its list of past tasks, which only
its state API shows. Each of Ray's processes wrote 8 KB of counters a minute.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

DEAD_LOG_BYTES = "MOE_CLUSTER_DEAD_LOG_BYTES"  # the limit for all files of ended processes on a node

# For every process of a Ray that serves; a variable that is set already keeps its value.
RAY_BOUNDS: Mapping[str, str] = {
    "RAY_task_events_report_interval_ms": "0",  # no list of past tasks
    "RAY_maximum_gcs_destroyed_actor_cached_count": "1000",  # instead of 100,000
    # Counters in logs once a day. Not -1: the GCS (Ray 2.60) then prints them without a pause, 60 MB a second.
    "RAY_event_stats_print_interval_ms": str(24 * 3_600_000),
    "RAY_ROTATION_MAX_BYTES": str(4 << 20),  # of a log file, instead of 512 MB or no bound
    "RAY_ROTATION_BACKUP_COUNT": "2",
    DEAD_LOG_BYTES: str(64 << 20),
}
REST_S = 3600.0  # a file with newer writes stays: a hidden process, as in a container, may have it open


def open_files() -> set[str]:
    """Paths that processes have open, as far as this user may see."""
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # another user's, or gone
            for descriptor in folder.iterdir():
                with suppress(OSError):
                    found.add(os.readlink(descriptor))
    return found


def clear_logs(folder: Path, max_bytes: int, *, in_use: Iterable[str], now: float | None = None) -> int:
    """Deletes the oldest log files that nobody has open, until the others have max_bytes at most; returns their number.

    in_use: paths that are open.  now: seconds of the wall clock.
    """
    keep, left, deleted = set(in_use), max_bytes, 0
    rests_since = (time.time() if now is None else now) - REST_S
    ended: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_symlink() or not path.is_file() or str(path.resolve()) in keep:
                continue
            stat = path.stat()
            ended.append((stat.st_mtime, stat.st_size, path))
    for modified_at, size, path in sorted(ended, reverse=True):
        left -= size
        if left < 0 and modified_at < rests_since:
            with suppress(OSError):
                path.unlink()
                deleted += 1
    if deleted:
        log.info("deleted %d log files of ended processes", deleted)
    return deleted
