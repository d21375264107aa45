"""The library's own environment, cache and locks, seen from processes of their own; and how progress is shown."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import EXPERTS, FIRST, NAME, Hub

from cluster.checkpoint.hub.progress import FileProgress, Progress, Stopped
from cluster.checkpoint.model_files import open_files
from cluster.checkpoint.names import expert_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.runtime.names import shard_group
from cluster.runtime.start.application import check_config

pytest_plugins = ["hub_fixtures"]

FETCH = """
import sys
from cluster.checkpoint.model_files import open_files, pinned
model = pinned(sys.argv[1])
files = open_files(model)
files.fetch(sys.argv[2:])
print(model, files.directory)
"""


class Process:
    """A process without torch and Ray that resolves a name and fetches files."""

    def __init__(self, home: Path, hub: Hub, *arguments: str, **variables: str) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "no_proxy", "NO_PROXY") if name in os.environ}
        environment = kept | {"HF_HOME": str(home), "HF_ENDPOINT": hub.address} | variables
        self._process = subprocess.Popen(
            [sys.executable, "-c", FETCH, *arguments], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=120)

    def result(self) -> str:
        out, err = self._process.communicate(timeout=120)
        return out.strip() if self._process.returncode == 0 else err.strip().splitlines()[-1]


def test_two_processes_of_a_node_fetch_a_file_once(hub: Hub, tmp_path: Path) -> None:
    """The answer with the file waits until both have asked for it, or one of them has long been locked out."""
    both = threading.Event()

    def wait_for_both(path: str) -> None:
        asked = [call for call in hub.calls if call.method == "HEAD" and call.path.endswith(EXPERTS[0])]
        if len(asked) == 2:
            both.set()
        if "/storage/" in path:
            both.wait(5.0)

    hub.before_body = wait_for_both
    processes = [Process(tmp_path / "home", hub, NAME, EXPERTS[0]) for _ in range(2)]
    results = [process.result() for process in processes]
    assert results == [f"{NAME}@{FIRST} {tmp_path}/home/hub/models--tiny--demo-moe/snapshots/{FIRST}"] * 2
    assert hub.fetched(".safetensors") == [EXPERTS[0]]


def test_a_killed_process_leaves_its_finished_files_and_its_lock_to_the_next(hub: Hub, tmp_path: Path) -> None:
    """The library begins a file anew that was half there: no bytes of the dead process are asked for or kept."""
    reached, gone = threading.Event(), threading.Event()

    def stop_at_the_second(path: str) -> None:
        if "/storage/" in path and len(hub.fetched(".safetensors")) == 2:
            reached.set()
            gone.wait(30)

    hub.before_body = stop_at_the_second
    first = Process(tmp_path, hub, NAME, EXPERTS[0])
    assert first.result().endswith(FIRST)
    second = Process(tmp_path, hub, NAME, EXPERTS[0], EXPERTS[1])
    assert reached.wait(60)
    second.kill()
    gone.set()
    assert list(tmp_path.rglob("*.incomplete"))
    hub.before_body = lambda path: None
    assert Process(tmp_path, hub, NAME, *EXPERTS).result().endswith(FIRST)
    assert hub.fetched(".safetensors") == [EXPERTS[0], EXPERTS[1], EXPERTS[1]]
    assert (tmp_path / "hub" / "models--tiny--demo-moe" / "snapshots" / FIRST / EXPERTS[1]).read_bytes() == (
        hub.repositories[NAME].files[EXPERTS[1]]
    )


def test_files_in_chunks_come_from_the_hubs_other_storage(hub: Hub, tmp_path: Path) -> None:
    """As on the hub, where all large files lie in Xet's: the library's own client for it puts them together."""
    pytest.importorskip("hf_xet")
    hub.xet = hub.address
    folder = Path(Process(tmp_path, hub, NAME, EXPERTS[0]).result().split()[1])
    assert (folder / EXPERTS[0]).read_bytes() == hub.repositories[NAME].files[EXPERTS[0]]
    assert [call.path for call in hub.calls if call.path.startswith("/xorbs/")]
    assert hub.fetched(".safetensors") == []
    assert Process(tmp_path, hub, NAME, EXPERTS[1], HF_HUB_DISABLE_XET="1").result().endswith(FIRST)
    assert hub.fetched(".safetensors") == [EXPERTS[1]]


def test_a_storage_that_cannot_be_reached_is_named_with_a_way_past_it(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    hub.xet = "http://127.0.0.1:9"
    quick = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    last = Process(tmp_path, hub, NAME, EXPERTS[0], **quick).result()
    assert f"{EXPERTS[0]} cannot be fetched from the hub's Xet storage (" in last
    assert last.endswith(f"set HF_HUB_DISABLE_XET=1 to take it from {hub.address} itself")


def test_token_cache_offline_and_proxy_are_the_librarys_variables(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME].token, cache = "hf_right", tmp_path / "elsewhere"
    assert "HF_TOKEN" in Process(tmp_path, hub, NAME).result()
    with_token = {"HF_TOKEN": "hf_right", "HF_HUB_CACHE": str(cache)}
    assert Process(tmp_path, hub, NAME, EXPERTS[0], **with_token).result().endswith(f"snapshots/{FIRST}")
    assert (cache / "models--tiny--demo-moe" / "snapshots" / FIRST / EXPERTS[0]).exists()
    calls = len(hub.calls)
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    assert Process(tmp_path, hub, NAME, EXPERTS[0], **offline).result().startswith(f"{NAME}@{FIRST} ")
    assert "HF_HUB_OFFLINE forbids" in Process(tmp_path, hub, NAME, EXPERTS[1], **offline).result()
    assert len(hub.calls) == calls
    beyond = {"HF_TOKEN": "hf_right", "HF_ENDPOINT": "http://hub.invalid", "http_proxy": hub.address}
    assert Process(tmp_path, hub, NAME, **beyond).result().startswith(f"{NAME}@{FIRST} ")
    assert all(call.path.startswith("http://hub.invalid/") for call in hub.calls[calls:])
    assert len(hub.calls) > calls


def test_a_start_from_a_directory_does_not_load_the_library(checkpoint: Path) -> None:
    code = (
        "import sys\nfrom cluster.engine.preflight import check_checkpoint\nfrom cluster.config import EngineConfig\n"
        f"check_checkpoint({str(checkpoint)!r}, EngineConfig(), 2)\n"
        "assert not [name for name in sys.modules if name.startswith(('huggingface_hub', 'httpx'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_clusters_group_is_that_of_the_commit(hub: Hub) -> None:
    def group(model: str) -> str:
        return shard_group(check_config(ClusterConfig(model=model)))

    first = group(NAME)
    assert first == group(f"{NAME}@main") == group(f"{NAME}@{FIRST}")
    hub.repositories[NAME].commit = "0" * 40
    assert group(NAME) != first
    assert group(f"{NAME}@{'0' * 40}") == group(NAME)


def test_the_application_is_built_with_the_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import app

    monkeypatch.setattr(app, "build_application", lambda config: config)
    built = app.build({"model": NAME, "expert_shards": 3})
    assert (built.model, built.expert_shards) == (f"{NAME}@{FIRST}", 3)


def test_lines_come_with_tenths_and_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB in pieces of 5: at 1 s a piece every tenth comes after 2 s; at 30 s a piece each piece has its line."""
    now, err = [0.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    progress = Progress("downloading it", 100_000_000, clock=lambda: now[0])
    for seconds in [1.0] * 10 + [30.0] * 10:
        now[0] += seconds
        progress.add(5_000_000)
    progress.close()
    lines = err.getvalue().splitlines()
    assert lines[:2] == ["downloading it: 10.0 of 100.0 MB", "downloading it: 20.0 of 100.0 MB"]
    assert len(lines) == 5 + 10
    assert lines[-1] == "downloading it: 100.0 of 100.0 MB"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


def test_a_terminal_gets_a_bar_with_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("downloading it", 100_000_000)
    progress.add(100_000_000)
    progress.close()
    shown = terminal.getvalue()
    assert "downloading it: 100%" in shown
    assert "100M/100M" in shown
    assert "\n" not in shown.strip()


def test_bytes_of_a_file_add_up_whichever_way_it_came() -> None:
    """Some seen, some lost with a broken connection, the rest fetched by another process: 100 in all."""
    counted: list[int] = []
    part = FileProgress(Progress("", 100, counted.append), 100)
    for num_bytes in (60, -20, 30):
        part.add(num_bytes)
    part.finish()
    assert counted == [60, -20, 30, 30]
    part.add(50)
    assert sum(counted) == 100


def test_a_stopped_download_ends_at_its_next_piece() -> None:
    progress = Progress("", 100)
    progress.stop()
    with pytest.raises(Stopped):
        progress.add(1)


def test_ctrl_c_ends_downloads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the hub sends: the call ends with it, and no half of a file stays."""
    reader = open_checkpoint(NAME)
    sending, stopped, stop = threading.Event(), threading.Event(), Progress.stop

    def wait_to_send(path: str) -> None:
        sending.set()
        stopped.wait(30)

    def interrupted(*_: object, **__: object) -> None:
        assert sending.wait(30)
        raise KeyboardInterrupt

    def stop_and_tell(progress: Progress) -> None:
        stop(progress)
        stopped.set()

    hub.before_body = wait_to_send
    monkeypatch.setattr("cluster.checkpoint.hub.snapshot.wait", interrupted)
    monkeypatch.setattr(Progress, "stop", stop_and_tell)
    with pytest.raises(KeyboardInterrupt):
        reader.fetch(expert_shapes(reader.config, 0, 0))
    assert not (reader.model_dir / EXPERTS[0]).exists()
    assert not list(reader.model_dir.parents[1].rglob("*.incomplete"))


def test_a_terminal_sees_that_a_slow_hub_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question waits until it is shown, but those of the download, which has its bar."""
    terminal = Terminal()
    monkeypatch.setattr("cluster.checkpoint.hub.progress.ASKING_DELAY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = f"asking the hub about {NAME}"

    def wait(path: str) -> None:
        deadline = time.monotonic() + 20
        while "/api/" in path and shown not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)

    hub.before_body = wait
    open_files(NAME)
    text = terminal.getvalue()
    assert shown in text
    assert text.index(shown) < text.index("downloading")


def test_a_pipe_hears_nothing_of_questions_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.checkpoint.hub.progress.ASKING_DELAY_S", 0.0)
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    hub.before_body = lambda path: time.sleep(0.02)
    open_files(NAME)
    assert err.getvalue() == ""
