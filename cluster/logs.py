"""How a process's log lines look: text, or one JSON object a line. Knows no Ray and no handler.

The format is one of the environment, so that processes hand it down to those that they make.
"""

import json
import logging
import os
from datetime import UTC, datetime

LOG_FORMAT = "MOE_CLUSTER_LOG_FORMAT"  # "json"; anything else is text


def make_formatter(process: str) -> logging.Formatter:
    """As the environment asks for. process: what the lines say whose they are."""
    if os.environ.get(LOG_FORMAT) == "json":
        return JsonFormatter(process)
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """Keys: ts (ISO 8601, UTC), level, logger, process, pid, message; request_id and exception where there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            said["request_id"] = request_id
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)
