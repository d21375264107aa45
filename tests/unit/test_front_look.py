"""A front that stands in for a dead manager's, and finds its place taken by a stranger."""

import asyncio
import os
import signal
import socket

import pytest

from cluster.runtime import front
from cluster.runtime.front import Front, FrontFiles, FrontTask


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        yield stranger.getsockname()[1]


def test_a_stand_in_that_finds_no_place_to_listen_ends_and_says_why(tmp_path, taken_port, monkeypatch, capfd):
    """Else it would serve on where nobody looks, and Serve would take it for healthy."""
    monkeypatch.setattr(front, "LOOK_S", 0.0)
    files = FrontFiles(
        admin=tmp_path / "a", handover=tmp_path / "h", inner=tmp_path / "i", config=tmp_path / "haproxy.cfg"
    )
    task = FrontTask(
        command=[], old_pids=[], addresses=[f"127.0.0.1:{taken_port}"], text=lambda fds, states: "", serves=False,
        copies=[], read={},
    )  # fmt: skip
    stands_in = Front(task, files, manager=os.getppid())
    stands_in._stands_in = True
    killed = []
    monkeypatch.setattr(stands_in, "_kill", killed.append)

    async def look():
        looking = asyncio.create_task(stands_in._look())
        while not killed and not looking.done():
            await asyncio.sleep(0.01)
        looking.cancel()

    asyncio.run(look())
    assert killed[:1] == [signal.SIGTERM]
    assert stands_in._ending
    assert "this one ends" in capfd.readouterr().err
