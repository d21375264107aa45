"""HAProxy and the processes above it die one by one while clients call; the test plays Serve's part."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from haproxy_tools import (
    Healthz,
    Manager,
    check_of,
    free_ports,
    haproxy_of,
    ingress,
    is_haproxy,
    pid_at,
    supervisor_of,
    until,
    write_config,
)

from cluster.metrics.process import is_running
from cluster.runtime.front.haproxy import PROGRAM

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class Ingress(health_pb2_grpc.HealthServicer):
    def __init__(self):
        self.go_on = threading.Event()

    def Check(self, request, context):
        return SERVING

    def Watch(self, request, context):
        yield SERVING
        self.go_on.wait(60)
        yield SERVING


class Caller:
    """Calls again and again on one channel, and on demand, as a client does that retries UNAVAILABLE.

    It has no back-off between connections, so that the gap is the server's.
    """

    def __init__(self, port):
        options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self.codes, self.longest_s, self._ended = {}, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        answered = time.monotonic()
        while not self._ended.is_set():
            try:
                health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
                code, now = "OK", time.monotonic()
                self.longest_s, answered = max(self.longest_s, now - answered), now
            except grpc.RpcError as error:
                code = error.code().name
            self.codes[code] = self.codes.get(code, 0) + 1
            time.sleep(0.002)

    def count(self):
        return self.codes.get("OK", 0)

    def goes_on(self):
        before = self.count()
        until(lambda: self.count() > before + 3)

    def end(self):
        self._ended.set()
        self._thread.join()
        self.channel.close()


class Node:
    """A folder, ports, an ingress behind them, and a manager."""

    def __init__(self, folder, backend_port):
        self.folder, self.backend_port = folder, backend_port
        self.ports = free_ports(4)
        self.manager = Manager()

    def config(self, known=True):
        return write_config(self.folder, self.ports, [self.backend_port] if known else None)

    def caller(self):
        return Caller(self.ports[0])


@pytest.fixture
def server():
    servicer = Ingress()
    with ingress(servicer) as servicer.port:
        yield servicer
        servicer.go_on.set()


@pytest.fixture
def node(tmp_path, server):
    node = Node(tmp_path, server.port)
    yield node
    node.manager.kill()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mine = str(tmp_path).encode() in (path / "cmdline").read_bytes()
        except OSError:
            continue
        if mine:
            with suppress(ProcessLookupError):  # it may end by itself
                os.kill(int(path.name), signal.SIGKILL)


@pytest.mark.parametrize("who", [haproxy_of, supervisor_of])
def test_a_killed_process_of_the_front_is_followed_by_another_before_serve_looks(node, who):
    """Its streams end with UNAVAILABLE. Serve asks the socket for the pid, and finds the one that it started."""
    ours = node.manager.start(node.config())
    caller = node.caller()
    caller.goes_on()
    for _ in range(3):
        haproxy, killed = haproxy_of(ours), who(ours)
        stream = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(stream) == SERVING
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        caller.goes_on()
        assert haproxy_of(ours) != haproxy
        until(lambda: pid_at(node.folder / "a.sock") == ours)
    caller.end()
    sys.stdout.write(f"longest time without an answer: {caller.longest_s:.3f} s, {caller.codes}\n")
    assert set(caller.codes) <= {"OK", "UNAVAILABLE"}


def test_serve_reloads_after_a_kill_as_before(node, server):
    """A stream from before the reload goes on at the draining HAProxy, which then ends."""
    first = node.manager.start(node.config())
    os.kill(haproxy_of(first), signal.SIGKILL)
    caller = node.caller()
    caller.goes_on()
    stream = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(stream) == SERVING
    second = node.manager.reload(node.config(), first)
    third = node.manager.reload(node.config(), second)
    caller.goes_on()
    until(lambda: not is_running(second, None))
    assert is_running(first, None)
    server.go_on.set()
    assert list(stream) == [SERVING]
    caller.end()
    until(lambda: not is_running(first, None))
    assert pid_at(node.folder / "a.sock") == third
    assert caller.codes.keys() == {"OK"}


def test_a_connection_that_comes_while_there_is_no_haproxy_waits(node):
    """A client finds the socket open; our program is stopped, so it cannot start the next HAProxy."""
    ours = node.manager.start(node.config())
    killed, supervisor = haproxy_of(ours), supervisor_of(ours)
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    caller = node.caller()
    time.sleep(0.5)
    assert caller.codes == {}
    os.kill(supervisor, signal.SIGCONT)
    caller.goes_on()
    caller.end()
    assert caller.codes.keys() == {"OK"}


def test_a_dead_manager_costs_nothing(node, server):
    """Nor does its successor, which at first knows no application: with it Serve would answer NOT_FOUND."""
    first = node.manager.start(node.config())
    caller = node.caller()
    caller.goes_on()
    stream = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(stream) == SERVING
    node.manager.kill()
    caller.goes_on()
    node.manager = Manager()
    second = node.manager.start(node.config(known=False))
    caller.goes_on()
    third = node.manager.reload(node.config(known=False), second)
    caller.goes_on()
    fourth = node.manager.reload(node.config(), third)
    caller.goes_on()
    server.go_on.set()
    assert list(stream) == [SERVING]
    caller.end()
    for pid in (first, second, third):
        until(lambda: not is_running(pid, None))  # noqa: B023 it ends before the next one
    assert pid_at(node.folder / "a.sock") == fourth
    assert caller.codes.keys() == {"OK"}


def test_a_killed_keeper_costs_nothing(node, server):
    """Serve then gets no answer at the admin socket, and makes a new manager, which takes over from the orphan."""
    first = node.manager.start(node.config())
    caller = node.caller()
    caller.goes_on()
    stream = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(stream) == SERVING
    haproxy = haproxy_of(first)
    os.kill(first, signal.SIGKILL)
    until(lambda: pid_at(node.folder / "a.sock") is None)
    caller.goes_on()
    node.manager.kill()
    node.manager = Manager()
    second = node.manager.start(node.config(known=False))
    caller.goes_on()
    third = node.manager.reload(node.config(), second)
    caller.goes_on()
    server.go_on.set()
    assert list(stream) == [SERVING]
    caller.end()
    until(lambda: not is_haproxy(haproxy))
    until(lambda: not is_running(second, None))
    assert pid_at(node.folder / "a.sock") == third
    assert caller.codes.keys() == {"OK"}


def test_who_stands_in_for_one_that_dies_then_takes_its_place(node):
    first = node.manager.start(node.config())
    node.manager.kill()
    node.manager = Manager()
    second = node.manager.start(node.config(known=False))
    haproxy, supervisor = haproxy_of(first), supervisor_of(first)
    os.kill(first, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not is_haproxy(haproxy))
    codes = set()

    def starting():
        with grpc.insecure_channel(f"127.0.0.1:{node.ports[0]}") as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError as error:
                codes.add(error.code().name)
                return "is starting" in error.details()

    until(starting)
    assert codes == {"UNAVAILABLE"}
    third = node.manager.reload(node.config(), second)
    caller = node.caller()
    caller.goes_on()
    caller.end()
    assert pid_at(node.folder / "a.sock") == third


@pytest.mark.parametrize("who", ["raylet", "manager and raylet", "itself and raylet", "all but HAProxy"])
def test_nothing_stays_of_a_node_that_ends(node, who):
    """`ray stop` kills the raylet; Serve ends an HAProxy that it no longer needs with SIGKILL."""
    node.manager.kill()
    node.manager = Manager(raylet=True)
    ours = node.manager.start(node.config())
    raylet = node.manager.process.pid
    manager = int(Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()[0])
    haproxy = haproxy_of(ours)
    killed = {
        "raylet": [raylet],
        "manager and raylet": [manager, raylet],
        "itself and raylet": [ours, raylet],
        "all but HAProxy": [ours, supervisor_of(ours)],
    }[who]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(ours, None) and not is_haproxy(haproxy))
    until(lambda: is_refused(node.ports[0]))
    if who != "all but HAProxy":
        return
    again = node.manager.start(node.config())
    assert haproxy_of(again)
    left = {path.name for path in node.folder.iterdir()}
    assert not left & {f"i{ours}", f"haproxy.{ours}.cfg"}
    os.kill(manager, signal.SIGKILL)


def is_refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_signal_to_all_of_a_terminal_or_a_service_is_not_for_it(node):
    ours = node.manager.start(node.config())
    assert os.getpgid(ours) != os.getpgid(node.manager.process.pid)
    assert os.getpgid(haproxy_of(ours)) == os.getpgid(ours)
    os.kill(ours, signal.SIGHUP)
    os.kill(ours, signal.SIGTERM)
    until(lambda: not is_running(ours, None))


def test_what_haproxy_cannot_read_is_said_and_ends_it(node):
    config = node.config()
    config.write_text(config.read_text().replace("balance leastconn", "balance nothing"))
    program = str(Path(sys.executable).parent / PROGRAM)
    done = subprocess.run([program, "-db", "-f", str(config)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "[ALERT]" in done.stderr
    assert "balance" in done.stderr


@pytest.mark.slow
def test_an_haproxy_that_always_dies_is_given_up(node):
    """Serve then gets no answer at its socket, and starts everything anew."""
    ours = node.manager.start(node.config())
    while is_running(ours, None):
        haproxy = haproxy_of(ours)
        if haproxy:
            os.kill(haproxy, signal.SIGKILL)
        time.sleep(0.05)


IMPATIENT = "from cluster.runtime.front import haproxy, supervisor; supervisor.ORPHAN_S = 2.0; haproxy.main()"


def test_without_another_manager_it_ends(node):
    node.manager.program = (sys.executable, "-c", IMPATIENT)
    ours = node.manager.start(node.config())
    haproxy = haproxy_of(ours)
    node.manager.kill()
    time.sleep(1)
    assert is_running(ours, None)
    until(lambda: not is_running(ours, None) and not is_haproxy(haproxy))


@pytest.mark.parametrize("message", ["DRAINING", "UNHEALTHY"])
def test_an_ingress_that_answers_a_check_with_no_is_taken_at_its_word(tmp_path, message):
    """HAProxy would wait 5 s for a "success", with an open connection, for whose end a draining ingress waits."""
    answers, manager = Healthz(), Manager()
    with ingress(Ingress(), healthz=answers) as port:
        try:
            manager.start(write_config(tmp_path, free_ports(4), [port]))
            until(lambda: check_of(tmp_path / "a.sock", "ingress0") == "L7OK")
            answers.message = message
            until(lambda: check_of(tmp_path / "a.sock", "ingress0") not in ("L7OK", "* L7OK"))
            assert check_of(tmp_path / "a.sock", "ingress0").removeprefix("* ") == "L7RSP"
        finally:
            manager.kill()
