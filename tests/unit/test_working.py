"""The progress that commands show: a spinner on a terminal, plain lines with NO_COLOR, news alone in a pipe."""

import functools
import io
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cluster import cli
from cluster.console import CountProgress, LoadProgress, Working, awaited
from cluster.doctor import Finding
from cluster.errors import ClusterError
from cluster.llm import LLM


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal, and returns it. (pytest sets stderr between a fixture and its test.)"""

    def make(**environment):
        monkeypatch.delenv("NO_COLOR", raising=False)
        for name, value in ({"TERM": "xterm"} | environment).items():
            monkeypatch.setenv(name, value)
        out = Terminal()
        monkeypatch.setattr("sys.stderr", out)
        return out

    return make


def wait_for(words, out):
    deadline = time.monotonic() + 30
    while words not in out.getvalue():
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)


def test_a_terminal_has_a_spinner_that_goes(terminal):
    out = terminal()
    with Working("connecting …", delay_s=0) as working:
        wait_for("connecting …", out)
        working.say("connected")
        wait_for("connected", out)
    text = out.getvalue()
    assert "\x1b[?25l" in text  # hides the cursor
    assert text.rindex("\x1b[2K") > text.rindex("connected")  # wipes the line at the end
    assert "\x1b[?25h" in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_draws_nothing_again_has_plain_lines(terminal, name, value):
    out = terminal(**{name: value})
    with Working("rolling …", delay_s=0) as working:
        wait_for("rolling …\n", out)
        working.say("shard 1")
    assert out.getvalue() == "rolling …\nshard 1\n"


def test_a_pipe_has_news_alone(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with Working("scaling …", delay_s=0) as working:
        time.sleep(0.05)
        working.say("1 of 2 run")
    assert out.getvalue() == "1 of 2 run\n"


def test_a_quick_block_shows_nothing_and_an_error_passes(terminal):
    out = terminal()
    with pytest.raises(ValueError, match="x"), Working("words", delay_s=3600):
        raise ValueError("x")
    assert out.getvalue() == ""


def test_awaited_pieces_are_all_there():
    assert list(awaited(iter("abc"), "words")) == ["a", "b", "c"]
    assert list(awaited(iter(""), "words")) == []


def test_counts_in_a_pipe_are_plain_lines_now_and_then(monkeypatch):
    """At 0, 4, 12 and 13 s: one line, at 12, for 10 s must pass."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    times = iter([0.0, 4.0, 12.0, 12.0, 13.0])
    with CountProgress("prompts", "prompts", clock=lambda: next(times)) as bar:
        for done in (10, 2000, 3000):
            bar.update(done, 4000)
    assert out.getvalue() == "prompts: 2,000 of 4,000 prompts\n"


def test_a_start_in_a_pipe_is_a_line_for_each_new_state(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with LoadProgress("starting") as progress:
        progress.start()
        for state in ("loading", "loading", "up"):
            shard = SimpleNamespace(shard_id=0, state=state, loaded_bytes=1, total_bytes=2)
            progress.update(SimpleNamespace(shards=[shard], replicas=[]))
    assert out.getvalue() == "starting\nexpert shard 0: loading\nexpert shard 0: up\n"


def test_the_doctor_shows_that_it_works_and_prints_the_same(terminal, monkeypatch, capsys):
    out = terminal()

    def examine():
        wait_for("looking at this machine and installation …", out)
        return [Finding("Python", "3")]

    monkeypatch.setattr("cluster.doctor.examine", examine)
    assert cli.main(["doctor", "--json"]) == 0
    assert capsys.readouterr().out.startswith('{\n  "can_serve": true')


def test_an_llm_shows_on_a_terminal_that_it_loads(terminal, monkeypatch):
    out = terminal()

    def load_engine(*args, **options):
        wait_for("loading demo …", out)
        raise ClusterError("no engine")

    monkeypatch.setattr("cluster.llm.Working", functools.partial(Working, delay_s=0))
    monkeypatch.setattr("cluster.llm.load_engine", load_engine)
    with pytest.raises(ClusterError, match="no engine"):
        LLM("demo")


def test_a_locale_without_the_characters_gets_others():
    """Through a real descriptor: the stream is one of its own, whatever stderr becomes meanwhile."""
    program = (
        "from cluster.cli import terminal\nfrom cluster.console import Working\n"
        "def work():\n    with Working('x', delay_s=9) as working, terminal.bounded(60, 'late'):\n"
        "        working.say('rolling …')\n    return 0\nterminal.run(work)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"rolling ...\n")
