"""`bench plan-check`: its options, and the rest before it measures."""

from types import SimpleNamespace

import pytest

from cluster.bench.planning import served
from cluster.cli import main
from cluster.errors import ClusterError


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seconds", "0"], "--seconds is 0, 1 to 3600 are possible"),
        (["--seconds", "-1"], "--seconds is -1"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--seconds", "1e300"], "--seconds is 1e+300"),
        (["--output", "/"], "--output / is a directory"),
        (["--output", "/missing/file"], "its directory does not exist"),
        (["--output", "x", "--calibration", "y"], "--output is of a calibration that is made now"),
        (["--calibration", "/missing/file"], "cannot be read: No such file"),
    ],
)
def test_a_check_that_is_impossible_is_refused_before_anything_is_measured(capsys, options, named):
    assert main(["bench", "plan-check", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def bench(monkeypatch, busy_cores):
    """Of a cluster that keeps so many cores busy, as a virtual clock goes on."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(served, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    found = served.Bench(SimpleNamespace(status=lambda: None), lambda: None, 1)
    monkeypatch.setattr(found, "_core_s", lambda _: {"front": busy_cores * clock.now})
    return found


def test_an_idle_cluster_has_settled(monkeypatch):
    assert bench(monkeypatch, 0.2).settle() == pytest.approx(0.2)


def test_a_cluster_that_stays_busy_is_not_measured(monkeypatch):
    with pytest.raises(ClusterError, match=r"kept 1\.50 cores busy for 60 s"):
        bench(monkeypatch, 1.5).settle()
