"""Formats a process's log lines: as text, or as one JSON object a line. Knows no Ray and no handler.

The environment sets the format, so that processes pass it on to those that they start.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

SELDOM_S = 60.0  # between two lines of one kind
LOG_FORMAT = "MOE_CLUSTER_LOG_FORMAT"  # "json"; anything else is text


def make_formatter(process: str) -> logging.Formatter:
    """The formatter that the environment asks for. process: its name in the lines."""
    if os.environ.get(LOG_FORMAT) == "json":
        return JsonFormatter(process)
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class SeldomLog:
    """Warnings that clients can cause at a rate of their own: of each kind one in a minute, with how many it stands
    for, so that no client can fill a disk. For several threads."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # by message: when it was written, and how often not since

    def warning(self, message: str, *args: object) -> None:
        """message: with places for the arguments; it is the kind."""
        now = self._clock()
        with self._lock:
            written, left_out = self._last.get(message, (-SELDOM_S, 0))
            if now - written < SELDOM_S:
                self._last[message] = written, left_out + 1
                return
            self._last[message] = now, 0
        if left_out:
            self._log.warning(f"{message} (and %d more in the %.0f s before)", *args, left_out, now - written)
        else:
            self._log.warning(message, *args)


class JsonFormatter(logging.Formatter):
    """Keys: ts (ISO 8601, UTC), level, logger, process, pid, message; request_id and exception where there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
