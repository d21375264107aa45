"""Log lines as JSON, for a collector of logs."""

import json
import logging
import sys
from datetime import datetime

import pytest

from cluster.logs import LOG_FORMAT, JsonFormatter, SeldomLog, make_formatter
from cluster.runtime import process
from cluster.runtime.process import actor_environment


def record(message, *args, exc_info=None, **extra):
    made = logging.getLogger("cluster.test").makeRecord(
        "cluster.test", logging.WARNING, __file__, 1, message, args, exc_info, extra=extra
    )
    made.created = 1_700_000_000.25  # 2023-11-14T22:13:20.250Z
    return made


def test_a_line_is_one_object_with_time_level_and_whose_it_is():
    line = JsonFormatter("moe-1:shard-3").format(record("shard %d\nis “gone”", 3, request_id="mine"))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["message"] == "shard 3\nis “gone”"
    assert (fields["level"], fields["logger"], fields["process"]) == ("WARNING", "cluster.test", "moe-1:shard-3")
    assert fields["ts"] == "2023-11-14T22:13:20.250+00:00"
    assert datetime.fromisoformat(fields["ts"]).timestamp() == 1_700_000_000.25
    assert fields["request_id"] == "mine"
    assert "exception" not in fields


def test_an_exception_is_a_string_of_the_same_object():
    try:
        raise ValueError("broken")
    except ValueError:
        line = JsonFormatter("p").format(record("failed", exc_info=sys.exc_info()))
    fields = json.loads(line)
    assert fields["exception"].startswith("Traceback")
    assert fields["exception"].endswith("ValueError: broken")
    assert "request_id" not in fields


@pytest.mark.parametrize(
    ("format", "kind"), [("json", JsonFormatter), ("text", logging.Formatter), (None, logging.Formatter)]
)
def test_the_environment_says_which(monkeypatch, format, kind):
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    if format is not None:
        monkeypatch.setenv(LOG_FORMAT, format)
    assert type(make_formatter("p")) is kind


def test_a_process_hands_the_format_down_to_those_it_makes(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "metrics_dir", lambda group: tmp_path)  # that of a connected Ray
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    assert LOG_FORMAT not in actor_environment("g", 1)["env_vars"]
    assert actor_environment("g", 1, "json")["env_vars"][LOG_FORMAT] == "json"
    monkeypatch.setenv(LOG_FORMAT, "json")
    assert actor_environment("g", 1)["env_vars"][LOG_FORMAT] == "json"


def test_what_clients_cause_is_logged_once_a_minute_with_a_count(caplog):
    """Three at once, one 59 s later, one at 60 s: the first and the last are written, kinds apart."""
    now = 0.0
    seldom = SeldomLog(logging.getLogger("clients"), lambda: now)
    for name in "abc":
        seldom.warning("no room for %s", name)
    seldom.warning("another kind")
    now = 59.0
    seldom.warning("no room for %s", "d")
    now = 60.0
    seldom.warning("no room for %s", "e")
    now = 130.0
    seldom.warning("no room for %s", "f")
    assert caplog.messages == [
        "no room for a", "another kind", "no room for e (and 3 more in the 60 s before)", "no room for f",
    ]  # fmt: skip
