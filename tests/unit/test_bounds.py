"""Log files of ended processes are cleared away; those in use, and fresh ones, never."""

import os
import subprocess
import sys

import pytest

from cluster.runtime.bounds import RAY_BOUNDS, clear_logs, open_files
from cluster.runtime.front.haproxy import ray_environment

NOW = 1_000_000.0
HOURS = 3600.0


@pytest.fixture
def write(tmp_path):
    def make(name, num_bytes, age_s):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * num_bytes)
        os.utime(path, (NOW - age_s, NOW - age_s))
        return path

    return make


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_oldest_go_until_the_others_fit(tmp_path, write):
    """4 + 3 + 3 bytes, newest first, and room for 7."""
    write("new.err", 4, 2 * HOURS)
    write("serve/middle.log", 3, 3 * HOURS)
    write("old.err", 3, 4 * HOURS)
    assert clear_logs(tmp_path, 7, in_use=(), now=NOW) == 1
    assert names(tmp_path) == ["new.err", "serve/middle.log"]
    assert clear_logs(tmp_path, 7, in_use=(), now=NOW) == 0


def test_what_a_process_has_open_is_neither_deleted_nor_counted(tmp_path, write):
    used = write("raylet.out", 100, 9 * HOURS)
    write("old.err", 5, 4 * HOURS)
    assert clear_logs(tmp_path, 5, in_use=[str(used)], now=NOW) == 0
    assert names(tmp_path) == ["old.err", "raylet.out"]


def test_what_was_written_lately_stays_whoever_has_it_open(tmp_path, write):
    """In a pod the autoscaler's processes are hidden, its log is not."""
    write("monitor.log", 100, 60.0)
    write("old.err", 5, 4 * HOURS)
    assert clear_logs(tmp_path, 10, in_use=(), now=NOW) == 1
    assert names(tmp_path) == ["monitor.log"]


def test_links_lead_nowhere(tmp_path, write):
    """Ray's session_latest, say: what is behind one belongs to somebody else."""
    outside = write("../outside.txt", 100, 9 * HOURS)
    (tmp_path / "link").symlink_to(outside)
    assert clear_logs(tmp_path, 0, in_use=(), now=NOW) == 0
    assert outside.exists()


def test_a_folder_that_is_gone_is_no_error(tmp_path):
    assert clear_logs(tmp_path / "gone", 0, in_use=(), now=NOW) == 0


def test_another_processs_open_file_is_found(tmp_path):
    path = tmp_path / "worker.err"
    with path.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
        )  # fmt: skip
    process.stdout.readline()
    assert str(path) in open_files()
    process.communicate(b"\n")
    assert str(path) not in open_files()


def test_a_generation_of_processes_after_another_does_not_fill_the_disk(tmp_path, write):
    """A process an hour for a week, 1 KB of log each, looked after now and then: 20 KB at most, and what is fresh."""
    for hour in range(7 * 24):
        path = write(f"worker-{hour}.err", 1000, 0)
        os.utime(path, (hour * HOURS, hour * HOURS))
        clear_logs(tmp_path, 20_000, in_use=(), now=hour * HOURS + 60)
        assert len(names(tmp_path)) <= 21
    assert len(names(tmp_path)) >= 20


def test_every_ray_that_is_started_by_us_or_our_words_is_bounded():
    assert RAY_BOUNDS.items() <= ray_environment().items()
