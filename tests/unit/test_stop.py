"""A server's stop goes on, whatever step or output fails. Fakes instead of Ray."""

import ctypes
import io
import os
import signal

import pytest
import ray

from cluster.cli import main, serving
from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.footprint import folders
from cluster.footprint.folders import OwnedFolder
from cluster.runtime.start import served as launch
from cluster.runtime.start.application import check_cpus
from cluster.runtime.start.local_ray import ConnectedRay, start_ray
from cluster.runtime.start.ray_processes import apart
from cluster.runtime.start.served import ServedCluster

GONE = ray.exceptions.GetTimeoutError("no answer")


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """A served cluster of which only the stop is real; returns it and the steps that it took."""
    monkeypatch.setattr(folders, "BASE", tmp_path)
    taken, fails = [], {}

    def step(name):
        def take(*args):
            taken.append(name)
            if name in fails:
                raise fails[name]

        return take

    cluster = ServedCluster.__new__(ServedCluster)
    cluster.group, cluster._folder, cluster._ray = "moe-0", OwnedFolder(), ConnectedRay(stop=step("Ray"))
    monkeypatch.setattr(cluster, "drain", step("drain"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(launch, "find_actor", lambda name: name)
    monkeypatch.setattr(launch, "close_controller", step("shards"))
    monkeypatch.setattr(launch.serve, "shutdown", step("Serve"))
    return cluster, taken, fails


@pytest.mark.parametrize(
    "fails",
    [
        {},
        {"drain": GONE},
        {"drain": SetupError("there is no expert controller"), "Serve": RuntimeError("gone"), "shards": GONE},
        {"Serve": ValueError("no such actor"), "shards": OSError("read-only")},
    ],
)
def test_a_step_that_fails_stops_none_of_the_later_ones(steps, fails):
    cluster, taken, failing = steps
    failing.update(fails)
    cluster.close()
    assert taken == ["drain", "Serve", "shards", "Ray"]
    assert not cluster._folder.path.exists()


def test_even_what_nobody_has_thought_of_ends_ray(steps):
    cluster, taken, failing = steps
    failing["Serve"] = AssertionError("a bug")
    with pytest.raises(AssertionError):
        cluster.close()
    assert taken[-1] == "Ray"
    assert not cluster._folder.path.exists()


class Full(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["ascii", "closed", "full", "closed pipe"])
def test_what_cannot_be_printed_is_left_out(kind):
    if kind == "ascii":
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    elif kind == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        out = os.fdopen(writer, "w")
    else:
        out = Full() if kind == "full" else io.StringIO()
        if kind == "closed":
            out.close()
    serving._say("stopping: waiting for running requests …", out)
    if kind == "closed pipe":
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # its buffer needs a place to go


@pytest.mark.parametrize("option", ["--cpus-per-expert-shard", "--cpus-per-attention-replica"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "100000"])
def test_cpus_that_no_process_can_have_are_refused_in_a_line_before_anything_starts(
    demo_checkpoint, option, value, capsys, monkeypatch
):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the tests' Ray has CPUs of its own
    assert main(["serve", str(demo_checkpoint), f"{option}={value}", "--grpc-port", "0"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-cluster: ")]
    assert len(lines) == 1
    assert option[2:].replace("-", "_") in lines[0]


def test_the_cpus_of_all_processes_together_may_be_more_than_there_are():
    """Processes take turns on the CPUs; a setting for processes that do not start asks for nothing."""
    check_cpus(ClusterConfig(model="m", expert_shards=1000), attention_replicas=1000)
    check_cpus(ClusterConfig(model="m", cpus_per_attention_replica=8_000.0))
    with pytest.raises(SetupError, match="cpus_per_expert_shard is 8000, and this machine has"):
        check_cpus(ClusterConfig(model="m", cpus_per_expert_shard=8_000.0))


@pytest.mark.parametrize("kept", [True, False])
def test_ray_takes_sigterm_only_where_nobody_has_a_handler_for_it(kept):
    def ours(*args):
        pass

    before = signal.signal(signal.SIGTERM, ours if kept else signal.SIG_DFL)
    try:
        with apart():
            ray._private.utils.set_sigterm_handler(print)
        assert signal.getsignal(signal.SIGTERM) is (ours if kept else print)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_is_ours_again_when_rays_library_has_taken_it():
    """Its C++ part (absl's failure handler) takes SIGTERM past Python: a traceback and an abort (-6) at a start."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append("ours"))
    try:
        with apart():
            ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["ours"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            Exception("The node timed out during startup.\nThis could"),
            "Ray did not start: The node timed out",
        ),
        (ValueError(), "Ray did not start: ValueError"),
        (SetupError("--host is no address"), "--host is no address"),
    ],
)
def test_a_ray_that_does_not_start_leaves_nothing_and_says_why_in_a_line(monkeypatch, tmp_path, error, words):
    monkeypatch.setattr(folders, "BASE", tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the tests' own may be connected
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # and stays

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(SetupError) as raised:
        start_ray(num_cpus=1)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)
    assert folders.locked() == []
    assert [path.name for path in folders.root().iterdir()] == ["lock"]
