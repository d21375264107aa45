"""However a server ends, nothing of it stays, clients hear of it at once, and other servers of the machine go on."""

import os
import signal
import subprocess
from urllib.request import urlopen

import grpc
import pytest
from serving_tools import COMMAND, Serving, wait_until

from cluster.footprint.folders import clean
from cluster.footprint.processes import members
from cluster.footprint.servers import servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SOON_S = 30.0  # Ray by itself takes a minute or for ever


@pytest.fixture
def serving(demo_checkpoint, tmp_path):
    """Starts several at once."""
    made = []

    def start(*environments):
        for environment in environments:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            made.append(Serving(demo_checkpoint, folder, environment=environment))
        return [server.wait_ready() for server in made[-len(environments) :]]

    yield start
    for server in made:
        server.end()


def assert_gone(server):
    wait_until(lambda: not members(server.folder) and not server.folder.exists(), SOON_S)


def assert_lost(server, stream, who):
    """Its exit code makes systemd and Kubernetes start it again; one line tells a user the reason."""
    assert server.process.wait(SOON_S) == 1
    assert members(server.folder) == []
    assert stream.join(SOON_S) == grpc.StatusCode.UNAVAILABLE
    [line] = [line for line in server.err.read_text().splitlines() if line.startswith("moe-cluster: ")]
    assert who in line
    assert "was ended by SIGKILL" in line
    assert server.out.read_text().rstrip().endswith("Ctrl-C drains and stops.")  # Ray adds nothing
    assert_gone(server)


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)


def requests_of(server):
    with urlopen(server.metrics, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("moecluster_requests_total{"))


def test_of_two_servers_with_one_configuration_each_keeps_its_own(serving):
    """The first one's raylet dies; a signal to the whole group of the second lets its stream end."""
    one, other = serving({}, {})
    addresses = {server.grpc_address: server.ray_address for server in servers()}
    both = [addresses[f"127.0.0.1:{server.grpc_port}"] for server in (one, other)]

    guess = run("status")
    assert guess.returncode == 2
    assert "servers run here: choose one with --ray-address" in guess.stderr
    assert all(address in guess.stderr for address in both)
    assert run("status", "--ray-address", both[0]).returncode == 0

    assert one.stream(5).join() is None
    wait_until(lambda: requests_of(one) == 1)
    assert requests_of(other) == 0

    lost, kept = one.stream(3000), other.stream(800)
    one.kill("raylet")
    assert_lost(one, lost, "Ray's raylet")
    assert kept.join() is None
    wait_until(lambda: requests_of(other) == 1)
    assert run("status", "--ray-address", both[1]).returncode == 0

    drained = other.stream(1000)
    os.killpg(other.process.pid, signal.SIGTERM)
    assert drained.join() is None
    assert drained.num_tokens == 1000
    assert other.process.wait(120) == 0
    assert "stopped" in other.out.read_text()
    assert_gone(other)


def test_without_the_gcs_or_without_its_first_process_nothing_stays(serving):
    one, other = serving({}, {})
    streams = one.stream(3000), other.stream(3000)
    one.kill("gcs_server")
    other.process.kill()
    assert_lost(one, streams[0], "Ray's GCS")
    assert other.process.wait(SOON_S) == -signal.SIGKILL
    assert_gone(other)
    assert streams[1].join(SOON_S) == grpc.StatusCode.UNAVAILABLE


def test_a_closed_terminal_drains_and_what_lost_its_keeper_too_goes_with_the_next_start(
    serving,
):
    one, other = serving({"PYTHONIOENCODING": "ascii"}, {})
    drained, lost = one.stream(800), other.stream(3000)
    os.killpg(one.process.pid, signal.SIGHUP)
    [keeper] = [pid for pid in children(other.process.pid) if not in_folder(pid, other.folder)]
    os.kill(keeper, signal.SIGKILL)
    other.process.kill()
    other.process.wait()
    assert drained.join() is None
    assert drained.num_tokens == 800
    assert one.process.wait(120) == 0
    assert_gone(one)
    clean()  # as each start does first
    assert_gone(other)
    assert lost.join(SOON_S) == grpc.StatusCode.UNAVAILABLE


def children(pid):
    return list(map(int, subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True).stdout.split()))


def in_folder(pid, folder):
    return pid in members(folder)
