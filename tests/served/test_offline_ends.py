"""An `LLM` on a Ray of its own, in scripts as users write them: two at a time, no room, no `close`."""

import json
import subprocess
import sys

import pytest
from serving_tools import wait_until

from cluster.footprint.processes import members

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
report = {"before": tokens(one), "folder": folder()}
one.close()
one.close()
report["after"] = tokens(other)
for name, call in {"generate": lambda: tokens(one), "logits": lambda: one.logits([1])}.items():
    try:
        call()
    except ClusterError as error:
        report[name] = [type(error).__name__, str(error)]

from cluster.config import ClusterConfig
from cluster.metrics import DispatchMetrics, new_registry
from cluster.runtime.start.offline import RayExperts

@ray.remote
class Greedy:
    def ready(self): pass

def free_cpus():
    # when nothing comes free any more: what `one` had takes its time
    seen = []
    while len(seen) < 10 or len(set(seen[-10:])) > 1:
        seen.append(ray.available_resources()["CPU"])
        time.sleep(0.3)
    return seen[-1]

greedy = Greedy.options(num_cpus=free_cpus() - 1).remote()
ray.get(greedy.ready.remote())
config = ClusterConfig(model=sys.argv[1], dtype="float32", device="cpu", expert_shards=3, spare_processes=False)
try:
    RayExperts(config, DispatchMetrics(new_registry(), "test"), room_timeout_s=6.0)
except ClusterError as error:
    report["no room"] = [type(error).__name__, str(error)]
other.close()
report["a Ray is left"] = ray.is_initialized()
threads = {thread.name for thread in threading.enumerate()}
report["a thread is left"] = "shard-directory" in threads or "ray-watch" in threads
print(json.dumps(report))
"""

LOST = """
made = llm()
report = {"before": tokens(made), "folder": folder()}
ray._private.worker._global_node.all_processes["raylet"][0].process.kill()
time.sleep(3.0)
started = time.monotonic()
try:
    tokens(made)
except ClusterError as error:
    report["lost"] = [error.grpc_code, str(error)]
made.close()
print(json.dumps(report))
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


def assert_nothing_left(report):
    assert members(report["folder"]) == []
    assert subprocess.run(["test", "-e", report["folder"]]).returncode == 1


def test_two_share_a_ray_and_the_last_one_ends_it(demo_checkpoint):
    """66 CPUs at least, all but one of them taken: of three shards one finds room."""
    done, report = run(TWO, demo_checkpoint)
    assert done.returncode == 0, done.stderr
    assert len(report["before"]) == 8
    assert report["after"] == report["before"]
    assert report["generate"] == report["logits"] == ["Closed", "this LLM is closed: make another one"]
    kind, words = report["no room"]
    assert kind == "SetupError"
    assert words.startswith(
        "2 of 3 expert shards find no room: they ask for 1 CPU each (3 in all), the Ray cluster has "
    )
    assert "0 of them free, and none came free in 6 s" in words
    assert "2 of 3 expert shards find no room" in done.stderr  # logged long before it gives up
    assert not report["a Ray is left"]
    assert not report["a thread is left"]
    assert_nothing_left(report)


def test_without_its_raylet_it_says_so_and_can_be_closed(demo_checkpoint):
    done, report = run(LOST, demo_checkpoint)
    assert done.returncode == 0, done.stderr
    code, words = report["lost"]
    assert code == "UNAVAILABLE"
    assert "the Ray of the expert shards has died: Ray's raylet" in words
    assert_nothing_left(report)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("import os; os._exit(5)", 5)])
def test_a_script_that_ends_without_close_ends_as_it_says_and_leaves_nothing(demo_checkpoint, end, code):
    done, report = run(OPEN + end, demo_checkpoint)
    assert done.returncode == code, done.stderr
    if "_exit" in end:
        # only the keeper is left to clean up
        wait_until(
            lambda: not members(report["folder"]) and subprocess.run(["test", "-e", report["folder"]]).returncode
        )
    assert_nothing_left(report)
