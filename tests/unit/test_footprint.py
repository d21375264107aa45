"""The traces of a server on its machine, and their removal. Processes are real, for the kernel is what is asked."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.errors import SetupError
from cluster.footprint import folders, processes
from cluster.footprint.folders import OwnedFolder, clean, root
from cluster.footprint.processes import MARK, end_members, members
from cluster.footprint.servers import Server, announce, find_address, servers

SLEEP = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(600)"]
OWNER = """
import os, subprocess, sys, time
from cluster.footprint.folders import OwnedFolder
from cluster.footprint.keeper import start_keeper
folder = OwnedFolder()
keeper = start_keeper(folder)
child = subprocess.Popen(["sleep", "600"], env={"MOE_CLUSTER_FOLDER": str(folder.path)}, start_new_session=True)
print(folder.path, keeper.pid, child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BASE", tmp_path)
    return tmp_path


@pytest.fixture
def started():
    """Starts a process with a mark; kills it in the end."""
    processes = []

    def start(mark, command=SLEEP):
        process = subprocess.Popen(command, env={MARK: str(mark)}, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()  # it runs its program now, not ours
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    folder, keeper, child = process.stdout.readline().split()
    yield process, folder, int(keeper), int(child)
    process.kill()
    process.communicate()
    end_members(folder)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_who_was_started_with_a_folder_belongs_to_it_and_nobody_else(tmp_path, started):
    ours, other, longer = started(tmp_path / "a"), started(tmp_path / "b"), started(tmp_path / "ab")
    assert members(tmp_path / "a") == [ours.pid]
    assert end_members(tmp_path / "a") == []
    assert ours.wait(10) == -signal.SIGKILL
    assert (other.poll(), longer.poll()) == (None, None)


def test_what_a_member_starts_belongs_to_the_folder_in_any_session_and_without_its_parent(tmp_path, started):
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True); print(flush=True)"
    started(tmp_path, [sys.executable, "-S", "-c", script, "sleep", "600"]).wait()
    wait_until(lambda: len(members(tmp_path)) == 1)
    [orphan] = members(tmp_path)
    end_members(tmp_path)
    assert not runs(orphan)


def test_children_are_ended_before_their_parents(tmp_path, started, monkeypatch):
    """HAProxy before the ingresses, or it would tell clients that their streams were cancelled."""
    script = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); print(flush=True); time.sleep(600)"
    started(tmp_path, [sys.executable, "-S", "-c", script, sys.executable, "-S", "-c", script, "sleep", "600"])
    started(tmp_path)
    wait_until(lambda: len(members(tmp_path)) == 4)
    ended, kill = [], processes._kill
    monkeypatch.setattr(
        processes, "_kill", lambda pid, folder: (ended.append(processes._num_ancestors(pid)), kill(pid, folder))
    )
    assert end_members(tmp_path) == []
    assert ended[0] == ended[3] + 2
    assert ended == sorted(ended, reverse=True)


def test_a_folder_is_for_its_user_alone_and_so_is_what_holds_them_all(base):
    folder = OwnedFolder()
    assert folder.path.parent == root() == base / f"moe-{os.getuid()}"
    assert [path.stat().st_mode & 0o777 for path in (root(), folder.path)] == [0o700, 0o700]
    root().chmod(0o777)  # as an earlier version, or a hand, may have left it
    assert root().stat().st_mode & 0o777 == 0o700
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


@pytest.mark.parametrize("what", ["file", "link", "another user"])
def test_what_somebody_else_has_put_in_its_place_is_refused(base, what, monkeypatch):
    path = base / f"moe-{os.getuid()}"
    if what == "file":
        path.write_text("")
    elif what == "link":
        path.symlink_to(base)
    else:
        path.mkdir()
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
        (base / "moe-4000000").mkdir()
    with pytest.raises(SetupError, match="belongs to another user"):
        root()


def test_what_nobody_holds_is_cleaned_up_with_its_processes_and_the_rest_stays(base, started):
    held, left = OwnedFolder(), OwnedFolder()
    (left.path / "session").mkdir()
    stays, goes = started(held.path), started(left.path)
    os.close(left.lock)  # what the kernel does when its owner dies
    half_made = root() / "half"
    half_made.mkdir()
    clean()
    assert goes.wait(10) == -signal.SIGKILL
    assert (held.path.exists(), left.path.exists(), half_made.exists()) == (True, False, False)
    assert stays.poll() is None
    held.remove()


def test_when_an_owner_is_killed_its_keeper_ends_the_processes_and_removes_the_folder(owner):
    process, folder, keeper, child = owner
    process.kill()
    wait_until(lambda: not runs(child) and not os.path.exists(folder) and not runs(keeper))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_everybody_to_end_leaves_the_keeper(owner, number):
    process, folder, keeper, child = owner
    wait_until(lambda: ignores(keeper, number))
    os.kill(keeper, number)
    os.killpg(process.pid, number)
    wait_until(lambda: not runs(child) and not os.path.exists(folder))


def ignores(pid, number):
    with open(f"/proc/{pid}/status") as status:
        [mask] = [line.split()[1] for line in status if line.startswith("SigIgn")]
    return int(mask, 16) >> (number - 1) & 1


def test_when_both_are_killed_the_next_start_cleans_up(owner):
    process, folder, keeper, child = owner
    os.kill(keeper, signal.SIGKILL)
    process.kill()
    process.wait()
    wait_until(lambda: not runs(keeper))
    assert runs(child)
    clean()
    assert not runs(child)
    assert not os.path.exists(folder)


def server(port, started_at):
    return Server(
        ray_address=f"127.0.0.1:{port}",
        grpc_address="127.0.0.1:9000",
        model="/models/m",
        environment={"RAY_AUTH_TOKEN": f"token of {port}"},
        started_at=started_at,
    )


@pytest.fixture
def two(base, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    made = OwnedFolder(), OwnedFolder()
    announce(server(1, 100.0), made[0].path)
    announce(server(2, 200.0), made[1].path)
    yield made
    for folder in made:
        folder.remove()


def test_a_command_finds_the_server_that_runs_and_its_token_and_no_other_user_can_read_it(base, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    assert find_address() is None
    folder = OwnedFolder()
    assert find_address() is None  # it is starting
    announce(server(1, 100.0), folder.path)
    assert (folder.path / "server.json").stat().st_mode & 0o777 == 0o600
    assert find_address() == "127.0.0.1:1"
    assert os.environ["RAY_AUTH_TOKEN"] == "token of 1"
    folder.remove()
    assert find_address() is None


def test_the_stop_of_one_server_leaves_the_address_of_another(two):
    two[1].remove()
    assert find_address() == "127.0.0.1:1"
    assert [s.ray_address for s in servers()] == ["127.0.0.1:1"]


def test_of_several_servers_one_must_be_chosen(two):
    with pytest.raises(SetupError, match=r"2 servers run here: .*--ray-address: 127\.0\.0\.1:2 .*127\.0\.0\.1:1 "):
        find_address()
    assert find_address("127.0.0.1:1") == "127.0.0.1:1"
    assert os.environ["RAY_AUTH_TOKEN"] == "token of 1"
    assert find_address("host:6379") == "host:6379"  # a Ray that somebody else has started
    os.close(two[0].lock)  # its owner dies
    assert find_address() == "127.0.0.1:2"
    two[0].lock = -1


def test_what_is_no_servers_or_another_versions_is_passed_over(base, two):
    (two[0].path / "server.json").write_text('{"ray_address": "127.0.0.1:1", "new": 1}')
    assert find_address() == "127.0.0.1:2"
    (two[1].path / "server.json").write_text("{")
    assert find_address() is None
