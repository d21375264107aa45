"""An `LLM` on a Ray of its own, in scripts as people write them: two at a time, no room, no `close`."""

import json
import subprocess
import sys

import pytest
from serving_tools import wait_until

from cluster.footprint.processes import members

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

BEGIN = """
import json, sys, threading, time
import ray
from cluster import LLM, SamplingParams
from cluster.errors import ClusterError

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)

def llm(**options):
    return LLM(sys.argv[1], dtype="float32", device="cpu", transport="auto", kv_cache_bytes=4 << 20, **options)

def tokens(of):
    return of.generate([[1, 2, 3]], GREEDY)[0].token_ids

def folder():
    return ray._private.worker._global_node.get_session_dir_path().rpartition("/r/")[0]
"""

TWO = """
made = []
thread = threading.Thread(target=lambda: made.append(llm()))  # Ray must not end with the thread that started it
thread.start()
thread.join()
one, other = made[0], llm()
said = {"before": tokens(one), "folder": folder()}
one.close()
one.close()
said["after"] = tokens(other)
for name, call in {"generate": lambda: tokens(one), "logits": lambda: one.logits([1])}.items():
    try:
        call()
    except ClusterError as error:
        said[name] = [type(error).__name__, str(error)]

from cluster.config import ClusterConfig
from cluster.metrics import DispatchMetrics, new_registry
from cluster.runtime.start.offline import RayExperts

@ray.remote
class Greedy:
    def ready(self): pass

greedy = Greedy.options(num_cpus=ray.available_resources()["CPU"] - 1).remote()
ray.get(greedy.ready.remote())
config = ClusterConfig(model=sys.argv[1], dtype="float32", device="cpu", expert_shards=3, spare_processes=False)
try:
    RayExperts(config, DispatchMetrics(new_registry(), "test"), room_timeout_s=6.0)
except ClusterError as error:
    said["no room"] = [type(error).__name__, str(error)]
other.close()
said["a Ray is left"] = ray.is_initialized()
threads = {thread.name for thread in threading.enumerate()}
said["a thread is left"] = "shard-directory" in threads or "ray-watch" in threads
print(json.dumps(said))
"""

LOST = """
made = llm()
said = {"before": tokens(made), "folder": folder()}
ray._private.worker._global_node.all_processes["raylet"][0].process.kill()
time.sleep(3.0)
started = time.monotonic()
try:
    tokens(made)
except ClusterError as error:
    said["lost"] = [error.grpc_code, str(error)]
made.close()
print(json.dumps(said))
"""

OPEN = """
made = llm()
print(json.dumps({"before": tokens(made), "folder": folder()}), flush=True)
"""


def run(script, demo_checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(demo_checkpoint)], capture_output=True, text=True, timeout=280
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return done, json.loads(lines[-1])


def assert_nothing_left(said):
    assert members(said["folder"]) == []
    assert subprocess.run(["test", "-e", said["folder"]]).returncode == 1


def test_two_share_a_ray_and_the_last_one_ends_it(demo_checkpoint):
    """66 CPUs at least, all but one of them taken: of three shards one finds room."""
    done, said = run(TWO, demo_checkpoint)
    assert done.returncode == 0, done.stderr
    assert len(said["before"]) == 8
    assert said["after"] == said["before"]
    assert said["generate"] == said["logits"] == ["Closed", "this LLM is closed: make another one"]
    kind, words = said["no room"]
    assert kind == "SetupError"
    assert words.startswith(
        "2 of 3 expert shards find no room: they ask for 1 CPU each (3 in all), the Ray cluster has "
    )
    assert "0 of them free, and none came free in 6 s" in words
    assert "2 of 3 expert shards find no room" in done.stderr  # said long before it gives up
    assert not said["a Ray is left"]
    assert not said["a thread is left"]
    assert_nothing_left(said)


def test_without_its_raylet_it_says_so_and_can_be_closed(demo_checkpoint):
    done, said = run(LOST, demo_checkpoint)
    assert done.returncode == 0, done.stderr
    code, words = said["lost"]
    assert code == "UNAVAILABLE"
    assert "the Ray of the expert shards has died: Ray's raylet" in words
    assert_nothing_left(said)


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(3)", 3), ("import os; os._exit(5)", 5)])
def test_a_script_that_ends_without_close_ends_as_it_says_and_leaves_nothing(demo_checkpoint, end, code):
    done, said = run(OPEN + end, demo_checkpoint)
    assert done.returncode == code, done.stderr
    if "_exit" in end:
        # nobody but the keeper is there to clean up

        wait_until(lambda: not members(said["folder"]) and subprocess.run(["test", "-e", said["folder"]]).returncode)
    assert_nothing_left(said)
