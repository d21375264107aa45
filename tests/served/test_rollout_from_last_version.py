"""The last version's layout rolled to this one's under streams: their processes understand one another meanwhile.

The cluster is of this test alone, and so are the processes that serve and operate it: each runs one version.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from last_version import VERSION as LAST
from last_version import write_last_version
from next_version import VERSION as NEXT
from next_version import write_next_version
from serving_tools import Serving

from cluster.chaos.traffic import ask_all, make_questions
from cluster.client.grpc_client import Client

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

NUM_QUESTIONS = 8
# As an operator does: `serve deploy` until every replica is new, then `moe-cluster roll`.
ROLL_OUT = """
import json, os, sys
from cluster.footprint.servers import servers
[server] = [server for server in servers() if server.grpc_address.endswith(":" + sys.argv[1])]
os.environ.update(server.environment)
from dataclasses import replace
from ray import serve
from cluster.runtime.start.application import build_application
from cluster.runtime.operate import RunningCluster
from cluster.version import __version__
seen = []
with RunningCluster(server.ray_address) as cluster:
    seen.append(cluster.status().versions)
    config = replace(cluster.status().config, release=__version__, expert_shards=3)
    try:
        serve.run(build_application(config), name="moe-cluster", route_prefix="/", external_scaler_enabled=False)
    except RuntimeError:
        for deployment in serve.status().applications["moe-cluster"].deployments.values():
            print(deployment.message[-3000:], file=sys.stderr)
        raise
    seen.append(cluster.status().versions)
    cluster.roll()
    seen.append(cluster.status().versions)
    seen.append(len(cluster.status().shards))
print("\\n" + json.dumps(seen))
"""


@pytest.fixture
def versions(tmp_path):
    """A link to the last version, and beside it the folder of the next."""
    write_last_version(tmp_path / "last")
    assert write_next_version(tmp_path / "next") > 8
    for name in ("last", "next"):
        shutil.copy(Path(__file__).parent / "pinned.py", tmp_path / name / "sitecustomize.py")
    (tmp_path / "now").symlink_to(tmp_path / "last")
    return tmp_path / "now"


@pytest.fixture
def serving(versions, demo_checkpoint, tmp_path):
    # Ray's processes look for packages in the folder that it was started from, before PYTHONPATH.
    with contextlib.chdir(tmp_path):
        made = Serving(
            demo_checkpoint, tmp_path, "--expert-shards", "2", "--attention-replicas", "2",
            environment={"PYTHONPATH": str(versions)}, ports=["--grpc-port", "0", "--metrics-port", "0"],
        )  # fmt: skip
    yield made
    if made.process.poll() is None:
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(120)
    made.end()


def turn(link, folder):
    turned = link.with_name("turned")
    turned.symlink_to(folder)
    turned.rename(link)


def operate(script, grpc_port, link):
    return subprocess.Popen(
        [sys.executable, "-c", script, str(grpc_port)], env={**os.environ, "PYTHONPATH": str(link)},
        cwd=link.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_the_last_version_rolls_to_this_one_under_streams_and_no_answer_changes(serving, versions, tmp_path):
    serving.wait_ready()
    with Client(f"127.0.0.1:{serving.grpc_port}") as client:
        questions = make_questions(NUM_QUESTIONS, client.model_info().vocab_size, seed=3)
        quiet = ask_all(client, questions, concurrency=4)
        turn(versions, tmp_path / "next")
        operator = operate(ROLL_OUT, serving.grpc_port, versions)
        ended = threading.Thread(target=operator.wait)
        ended.start()
        rounds = []
        while ended.is_alive():
            rounds.append(ask_all(client, questions, concurrency=4))
        out, err = operator.communicate()
        rounds.append(ask_all(client, questions, concurrency=4))
    assert operator.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == [[LAST], [LAST, NEXT], [NEXT], 3]
    replies = [reply for again in rounds for reply in again]
    assert [reply.error for reply in replies if reply.error] == []
    assert all(reply.says_the_same(quiet[i % NUM_QUESTIONS]) for i, reply in enumerate(replies))
