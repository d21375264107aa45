"""Hosts on one machine: network namespaces, each with a raylet, on a bridge in the first one's."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

needs_namespaces = pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need root and iproute2"
)


RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Hosts:
    """Host 0 is Ray's head, without room for actors; each of the others has `num_cpus`.

    environment: of a host's Ray, by its number.  resources: of each of the others, beside its CPUs.  redis: a
    program; with it the head keeps its state there, and may die.
    """

    def __init__(self, num_hosts, num_cpus=4, *, environment=lambda host, folder: {}, resources=None, redis=None):
        self._name, self._net = uuid.uuid4().hex[:5], f"10.{os.getpid() % 200 + 20}.77"
        self._spaces = [f"moe-{self._name}-{i}" for i in range(num_hosts)]
        self._temp_dir = f"/tmp/moe-{self._name}"  # short: Ray's sockets lie below
        self._environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        self._num_cpus = num_cpus
        self._environment_of = environment
        self._resources = json.dumps(resources or {})
        self._redis = redis
        self._spared = set()  # pids on host 0 that are not Ray's
        self.address = f"{self._net}.1:6399"

    def start(self):
        for space in self._spaces:
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
        first, bridge = self._spaces[0], f"b{self._name}"
        self._ip("-n", first, "link", "add", bridge, "type", "bridge")
        self._ip("-n", first, "addr", "add", f"{self._net}.1/24", "dev", bridge)
        self._ip("-n", first, "link", "set", bridge, "up")
        for i, space in enumerate(self._spaces[1:], 1):
            ends = self.link(i), f"w{self._name}{i}"
            self._ip("link", "add", ends[0], "netns", first, "type", "veth", "peer", "name", ends[1], "netns", space)
            self._ip("-n", first, "link", "set", ends[0], "master", bridge)
            self._ip("-n", first, "link", "set", ends[0], "up")
            self._ip("-n", space, "addr", "add", f"{self._net}.{i + 1}/24", "dev", ends[1])
            self._ip("-n", space, "link", "set", ends[1], "up")
        if self._redis:
            options = ["--bind", self.ip(0), "--port", "6379", "--save", "", "--protected-mode", "no"]
            self._spared.add(self.popen(0, self._redis, *options).pid)
        for host in range(len(self._spaces)):  # one by one: they share a folder, and one of two at once may not come up
            self.start_ray(host)

    def ip(self, host):
        return f"{self._net}.{host + 1}"

    def start_ray(self, host):
        options = [f"--node-ip-address={self.ip(host)}", "--object-store-memory=100000000"]
        if host == 0:
            options += ["--head", "--num-cpus=0", "--port=6399", "--include-dashboard=false"]
            options += [f"--temp-dir={self._temp_dir}"]
        else:
            options += [f"--address={self.address}", f"--num-cpus={self._num_cpus}"]
            options += [f"--resources={self._resources}"]
        done = self.run(host, *RAY, "start", *options, environment=self._rays_environment(host))
        assert done.returncode == 0, done.stdout + done.stderr

    def _rays_environment(self, host):
        environment = self._environment_of(host, self._temp_dir)
        if self._redis and host == 0:
            return environment | {"RAY_REDIS_ADDRESS": f"{self.ip(0)}:6379"}
        if self._redis:
            return environment | {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        return environment

    def drain(self, node_id, seconds):
        """As an operator does; returns at once. Ray ends a node that drains once it is empty."""
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        options = ["--address", self.address, "--node-id", node_id, "--deadline-remaining-seconds", str(seconds)]
        done = self.run(0, *RAY, "drain-node", *options, *why)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self):
        for i, space in enumerate(self._spaces):
            self._kill(i)
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)
        for path in Path("/tmp").glob(f"moe-{self._name}*"):
            shutil.rmtree(path, ignore_errors=True)

    def command(self, host, *arguments):
        return ["ip", "netns", "exec", self._spaces[host], *arguments]

    def run(self, host, *arguments, timeout_s=120, environment=None):
        return subprocess.run(
            self.command(host, *arguments), check=False, env={**self._environment, **(environment or {})},
            capture_output=True, text=True, timeout=timeout_s, umask=0o077,
        )  # fmt: skip

    def popen(self, host, *arguments):
        environment = {**self._environment, **self._rays_environment(host)}
        return subprocess.Popen(
            self.command(host, *arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def link(self, host):
        """The bridge's end of a host's link."""
        return f"v{self._name}{host}"

    @contextmanager
    def cut_off(self, host):
        """Drops the host's packets; neither side gets an error."""
        self._ip("-n", self._spaces[0], "link", "set", self.link(host), "down")
        try:
            yield
        finally:
            self._ip("-n", self._spaces[0], "link", "set", self.link(host), "up")

    @contextmanager
    def slowed(self, host, milliseconds=50):
        """Delays every packet to the host; yields False where the kernel cannot do it."""
        where = ["ip", "netns", "exec", self._spaces[0], "tc", "qdisc"]
        delay = ["dev", self.link(host), "root", "netem", "delay", f"{milliseconds}ms"]
        done = subprocess.run([*where, "add", *delay], check=False, capture_output=True)
        try:
            yield done.returncode == 0
        finally:
            if done.returncode == 0:
                subprocess.run([*where, "del", *delay[:3]], check=True, capture_output=True)

    def pids(self, host):
        space = self._spaces[host]
        return subprocess.run(
            ["ip", "netns", "pids", space], check=False, capture_output=True, text=True
        ).stdout.split()

    def kill_host(self, host):
        """Kills all its processes at once."""
        self._kill(host)

    def kill_head(self):
        """Kills all its processes at once. Hosts have one folder and one list of processes here: by its file with the
        address, and by the others' raylets that name it, Ray would still take it as alive."""
        self._kill(0, but=self._spared)
        Path(self._temp_dir, "ray_current_cluster").unlink()

    def _kill(self, host, but=frozenset()):
        for pid in {int(pid) for pid in self.pids(host)} - but:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)

    def kill_raylet(self, host):
        for pid in self.pids(host):
            with open(f"/proc/{pid}/cmdline") as file:
                if file.read().split("\0")[0].endswith("/raylet"):
                    os.kill(int(pid), 9)

    @staticmethod
    def _ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def hosts(num_hosts, **options):
    made = Hosts(num_hosts, **options)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def read_line(process, timeout_s=60.0):
    """The next line of JSON from a process, without Ray's output; fails with its errors when it ends first."""
    started = time.monotonic()
    line = ""
    while not line.startswith("{"):
        line = process.stdout.readline()
        assert line, process.stderr.read()[-3000:]
    assert time.monotonic() - started < timeout_s
    return line
