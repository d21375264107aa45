"""The Ray that `moe-cluster serve` starts is closed to others, and bounded. Starts one in a new process, and nothing on
it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster.runtime.start import ray_start as module

SCRIPT = """
import json, os, subprocess, sys, tempfile
from pathlib import Path
import grpc, ray
from ray.core.generated import gcs_service_pb2 as pb, gcs_service_pb2_grpc
from cluster.runtime.bounds import RAY_BOUNDS
from cluster.runtime.start.local_ray import start_ray

def ask(address, *metadata):
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetAllNodeInfo(pb.GetAllNodeInfoRequest(), timeout=10, metadata=metadata)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

@ray.remote
def where():
    return ray.util.get_node_ip_address()

@ray.remote
def surroundings():
    with tempfile.TemporaryDirectory() as folder, open(folder + "/written", "w") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    return mode, {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

connected = start_ray(num_cpus=1)
mode, variables = ray.get(surroundings.remote())
folder = Path(ray._private.worker._global_node.get_logs_dir_path())
logs = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
address = ray.get_runtime_context().gcs_address
token = connected.environment["RAY_AUTH_TOKEN"]
look = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
environment = {**os.environ, **connected.environment}
other = subprocess.run([sys.executable, "-c", look, address], env=environment, capture_output=True, text=True)
said = {
    "address": address,
    "worker": ray.get(where.remote()),
    "nobody": ask(address),
    "guess": ask(address, ("authorization", "Bearer " + "0" * 64)),
    "token": ask(address, ("authorization", "Bearer " + token)),
    "other": other.stdout.strip(),
    "modes": {**logs, "written by a worker": mode},
    "variables": variables,
    "stay": [name for name in RAY_BOUNDS if name in os.environ],
}
connected.stop()
said["left"] = "RAY_AUTH_TOKEN" in os.environ
print(json.dumps(said))
"""


@pytest.mark.ray
def test_a_ray_of_ours_is_on_loopback_asks_for_its_token_and_is_bounded():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["address"].startswith("127.0.0.1:")
    assert report["worker"] == "127.0.0.1"  # the address of a shard's stream
    assert (report["nobody"], report["guess"], report["token"]) == ("UNAUTHENTICATED", "UNAUTHENTICATED", "OK")
    assert report["other"] == "1"
    assert not report["left"]
    assert report["modes"].keys() >= {"gcs_server.out", "raylet.out", "written by a worker"}
    assert {name: mode for name, mode in report["modes"].items() if mode & 0o077} == {}
    bounds = {"RAY_ROTATION_MAX_BYTES": "4194304", "RAY_task_events_report_interval_ms": "0"}
    assert report["variables"].items() >= bounds.items()
    assert report["stay"] == []


# The raylet of the first start takes a moment until it dies, as one whose port another process has taken.
RAYLET_THAT_DIES = """
import subprocess, ray
from cluster.runtime.start import local_ray, ray_start
from cluster.runtime.start.local_ray import start_ray

before, started = ray_start.services.start_raylet, []

def start_raylet(*arguments, **options):
    started.append(before(*arguments, **options))
    if len(started) <= NUM_DEATHS:
        started[-1].process.kill()
    return started[-1]

ray_start.services.start_raylet = start_raylet
try:
    connected = start_ray(num_cpus=1)
    print(len(started), len(ray.nodes()))
    connected.stop()
finally:
    print([info.process.poll() is None for info in started])
"""


@pytest.mark.ray
@pytest.mark.parametrize(("num_deaths", "printed"), [(1, "2 1\n[False, False]\n"), (3, "[False, False, False]\n")])
def test_another_ray_starts_where_a_raylet_ends_at_once(num_deaths, printed):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RAYLET_THAT_DIES.replace("NUM_DEATHS", str(num_deaths))],
        env=environment, capture_output=True, text=True, timeout=200, cwd="/",
    )  # fmt: skip
    assert done.stdout == printed, done.stderr
    assert (done.returncode != 0) == (num_deaths > 2)
    assert ("NoRaylet: Ray did not start: its raylet ended" in done.stderr) == (num_deaths > 2)


def test_a_raylet_may_take_its_time(monkeypatch, tmp_path):
    asked = []

    def get_node(gcs_address, node_id):
        asked.append((gcs_address, node_id))
        if len(asked) < 3:
            raise RuntimeError("no such node")
        return "a node"

    monkeypatch.setattr(module.services, "get_node", get_node)
    with module.patient(tmp_path):
        assert module.services.get_node("gcs", "id") == "a node"
        monkeypatch.setattr(module, "RAYLET_START_S", -1.0)
        asked.clear()
        with pytest.raises(module.NoRaylet, match="its raylet is not there after -1 s"):
            module.services.get_node("gcs", "id")
    assert asked == [("gcs", "id")]
    assert module.services.get_node is get_node


def test_a_raylet_that_ends_says_its_last_words(monkeypatch, tmp_path):
    def get_node(gcs_address, node_id):
        raise RuntimeError("no such node")

    logs = tmp_path / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("many\nwords\n")
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(module.services, "get_node", get_node)
    monkeypatch.setattr(module.services, "start_raylet", lambda: SimpleNamespace(process=ended))
    for words in ("words", "port 7 is taken"):
        with module.patient(tmp_path):
            module.services.start_raylet()
            with pytest.raises(module.NoRaylet, match=f"^Ray did not start: its raylet ended: {words}$"):
                module.services.get_node("gcs", "id")
        (logs / "raylet.err").write_text("port 7 is taken\n\n")
