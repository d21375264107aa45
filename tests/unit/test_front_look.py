"""The keeper of a front that stands in for a dead manager's, and finds its place taken by a stranger."""

import os
import socket

import pytest

from cluster.runtime.front import keeper as front_keeper
from cluster.runtime.front.keeper import FrontKeeper
from cluster.runtime.front.listeners import Handed
from cluster.runtime.front.supervisor import AGAIN, FrontFiles, FrontTask


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        yield stranger.getsockname()[1]


def test_a_stand_in_that_finds_no_place_to_listen_ends_and_tells_why(tmp_path, taken_port, monkeypatch):
    """Else it would serve on at unknown sockets, and Serve would regard it as healthy."""
    monkeypatch.setattr("cluster.runtime.front.listeners.TIMEOUT_S", 0.1)
    predecessors = [Handed(pid=7, keeper=6, listeners={}), None]
    monkeypatch.setattr(front_keeper, "ask_for", lambda path: predecessors.pop(0))
    files = FrontFiles(
        admin=tmp_path / "a", handover=tmp_path / "h", inner=tmp_path / "i", config=tmp_path / "haproxy.cfg"
    )
    task = FrontTask(
        command=[], old_pids=[], addresses=[f"127.0.0.1:{taken_port}"], text=lambda fds, states: "", serves=False,
        copies=[], read={},
    )  # fmt: skip
    keeper = FrontKeeper(task, files, manager=os.getppid())
    started = []

    def start():
        started.append(keeper._place.stands_in)
        keeper._child = os.fork()
        if keeper._child == 0:
            os._exit(AGAIN)

    monkeypatch.setattr(keeper, "_start", start)
    monkeypatch.setattr(front_keeper.signal, "signal", lambda number, handler: None)  # pytest keeps its own
    with pytest.raises(OSError, match=f"{taken_port}.*in use"):
        keeper.run()
    assert started == [True]
