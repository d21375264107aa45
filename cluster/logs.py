"""Formats a process's log lines: as text, or as one JSON object a line. Knows no Ray and no handler.

The environment sets the format, so that processes pass it on to those that they start.
"""

import json
import logging
import os
from datetime import UTC, datetime

LOG_FORMAT = "MOE_CLUSTER_LOG_FORMAT"  # "json"; anything else is text


def make_formatter(process: str) -> logging.Formatter:
    """The formatter that the environment asks for. process: its name in the lines."""
    if os.environ.get(LOG_FORMAT) == "json":
        return JsonFormatter(process)
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


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
