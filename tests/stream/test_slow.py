"""A stream whose shard computes for long: callers learn that it works, others connect, and silence is not work."""

import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
import torch
from stream_tools import ELSEWHERE, HERE, Backend, batch, connect

from cluster.errors import ProtocolError, ShardUnavailable
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.pulse import Pulse
from cluster.experts.routing import FixedPlan
from cluster.metrics import DispatchMetrics, new_registry
from cluster.stream import frames
from cluster.stream.client import StreamTransport
from cluster.stream.frames import HEADER, Header, Kind
from cluster.stream.server import StreamServer

BEAT_S = 0.05
TIMEOUT_S = 1.0


class Busy(Backend):
    """Computes for `seconds`, on the CPU; hangs instead while `hangs` is set."""

    def __init__(self, seconds=0.0, hangs=False):
        super().__init__()
        self.seconds, self.hangs = seconds, hangs

    def forward(self, batch, waited_s):
        if self.hangs:
            self.entered.set()
            self.gate.clear()
            assert self.gate.wait(60)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            torch.randn(64, 64) @ torch.randn(64, 64)
        return super().forward(batch, waited_s)


@pytest.fixture
def serve():
    made = []

    def start(backend):
        made.append((backend, StreamServer(backend, host="127.0.0.1", node=HERE, beat_s=BEAT_S)))
        made[-1][1].start()
        return made[-1][1]

    yield start
    for backend, server in made:
        backend.hangs = False
        backend.gate.set()
        server.close()


class Offers:
    def __init__(self, *servers):
        self.servers = servers

    def incarnation(self, shard_id):
        return 1

    def offer(self, shard_id):
        return self.servers[shard_id].offer


def dispatcher(node, *servers, **options):
    transport = StreamTransport(Offers(*servers), node=node, fallback=None, timeout_s=TIMEOUT_S)
    metrics = DispatchMetrics(new_registry(), "test")
    return ExpertDispatcher(
        transport, FixedPlan(plan_evenly([0], 4, len(servers))), metrics, shard_timeout_s=TIMEOUT_S, **options
    )


def run(made):
    """Rows for all of four experts at layer 0, where a shard of these tests sends its rows back."""
    x, ids = torch.randn(4, 6), torch.arange(4).unsqueeze(1)
    return x, made.combine(made.dispatch(0, x, ids, torch.ones(4, 1)))


@pytest.mark.parametrize("node", [HERE, ELSEWHERE], ids=["unix", "tcp"])
def test_rows_that_take_longer_than_every_timeout_come_and_are_computed_once(serve, node):
    backends = Busy(), Busy(2.5 * TIMEOUT_S)
    made = dispatcher(node, *map(serve, backends), recovery_timeout_s=TIMEOUT_S)
    x, out = run(made)
    assert torch.equal(x, out)
    assert [len(backend.groups) for backend in backends] == [1, 1]
    made.transport.close()


def test_rows_that_wait_behind_long_products_of_others_are_computed_once(serve):
    """Two engines: the second's rows wait for longer than its timeout before their own computation begins."""
    backend = Busy(1.2 * TIMEOUT_S)
    server = serve(backend)
    first = connect(server)
    ids = [first.send(batch(layer_id=layer)) for layer in (1, 2)]
    assert _until(lambda: server._pulse.sign().busy)
    x, out = run(dispatcher(HERE, server, recovery_timeout_s=TIMEOUT_S))
    assert torch.equal(x, out)
    for request_id in ids:
        first.receive(request_id, batch().hidden_states, 20)
    assert sorted(layer for layer, _ in backend.groups) == [0, 1, 2]
    first.close()


def test_a_long_queue_of_short_products_is_not_silence(serve):
    """No product takes as long as a beat; all before a row's turn take one and a half timeouts."""
    backend = Busy(BEAT_S / 2)
    server = serve(backend)
    callers = [connect(server) for _ in range(int(1.5 * TIMEOUT_S / (BEAT_S / 2) / 8) + 1)]
    for i, caller in enumerate(callers):
        for layer in range(8):
            caller.send(batch(layer_id=1 + 8 * i + layer))
    x, out = run(dispatcher(HERE, server, recovery_timeout_s=TIMEOUT_S))
    assert torch.equal(x, out)
    assert [rows for layer, rows in backend.groups if layer == 0] == [4]
    for caller in callers:
        caller.close()


@pytest.mark.parametrize("node", [HERE, ELSEWHERE], ids=["unix", "tcp"])
def test_a_caller_connects_while_the_shard_computes(serve, node):
    backend = Busy()
    server = serve(backend)
    backend.hangs = True
    first = connect(server)
    first_id = first.send(batch())
    assert backend.entered.wait(20)
    second = connect(server, node)
    second_id = second.send(batch(2))
    backend.hangs = False
    backend.gate.set()
    assert second.receive(second_id, batch(2).hidden_states, 20).shape == (2, 6)
    assert first.receive(first_id, batch().hidden_states, 20).shape == (3, 6)
    first.close()
    second.close()


def test_a_computation_that_hangs_is_silence(serve):
    """The process lives and its deputy answers, but no work goes on."""
    backend = Busy(hangs=True)
    made = dispatcher(HERE, serve(backend), recovery_timeout_s=TIMEOUT_S)
    began = time.monotonic()
    with pytest.raises(ShardUnavailable):
        run(made)
    assert time.monotonic() - began >= TIMEOUT_S
    made.transport.close()


def _serve_slowly(pipe, seconds):
    server = StreamServer(Busy(seconds), host="127.0.0.1", node=HERE, beat_s=BEAT_S)
    server.start()
    pipe.send(server.offer)
    threading.Event().wait()


def test_a_stopped_process_is_silence_also_in_the_middle_of_its_work():
    """It would need 60 s; it is stopped when it has shown that it works."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_slowly, args=(theirs, 60.0), daemon=True)
    process.start()
    try:
        remote = type("Remote", (), {"offer": ours.recv()})
        made = dispatcher(HERE, remote, recovery_timeout_s=TIMEOUT_S)
        flight = made.dispatch(0, torch.randn(4, 6), torch.arange(4).unsqueeze(1), torch.ones(4, 1))
        with pytest.raises(TimeoutError):
            flight.legs[0].flight.result(5 * BEAT_S)
        assert _until(lambda: _hears(flight.legs[0].flight))
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ShardUnavailable):
            made.combine(flight)
    finally:
        process.kill()
        process.join()


def _hears(flight):
    try:
        flight.result(BEAT_S)
    except TimeoutError:
        return flight.works()


def test_an_older_caller_gets_no_frame_that_it_does_not_know(serve):
    """Its handshake has zeros where a newer one names its features: it gets no frame between question and answer."""
    backend = Busy(10 * BEAT_S)
    server = serve(backend)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(f"\0{server.offer.unix_name}")
    nonce = sock.recv(frames.GREETING.size, socket.MSG_WAITALL)[-32:]
    proof = frames.mac(server.offer.secret, b"client", nonce)
    sock.sendall(frames.MAGIC + frames.VERSION.to_bytes(2, "little") + b"\0\0" + b"o" * 32 + proof)
    sock.recv(frames.WELCOME.size, socket.MSG_WAITALL)
    parts = b"\0" * 4, b"\0" * 4, b"\0" * 8
    sock.sendall(
        Header(kind=Kind.REQUEST, request_id=1, payload_bytes=16, rows=1, hidden_size=2, topk=1).pack(*parts)
        + b"".join(parts)
    )
    head = Header.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL))
    assert head.kind is Kind.ANSWER
    sock.close()


def test_an_older_shard_gets_the_same_bytes_but_for_two_that_it_skips():
    """Version 2 first had padding in their place; all three frames of the handshake keep their size."""
    assert (frames.VERSION, frames.GREETING.size, frames.HELLO.size, frames.WELCOME.size) == (2, 40, 72, 40)
    hello = frames.HELLO.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, b"n" * 32, b"p" * 32)
    assert hello[:6] + hello[8:] == b"moeX\x02\0" + b"n" * 32 + b"p" * 32


def test_a_caller_that_reads_nothing_is_not_buried_in_signs_of_work(serve):
    backend = Busy(20 * BEAT_S)
    server = serve(backend)
    connection = connect(server)
    request_id = connection.send(batch())
    assert _until(lambda: backend.groups)
    assert connection.receive(request_id, batch().hidden_states, 20).shape == (3, 6)
    assert 0 < connection.num_heard <= 22
    connection.close()


def test_a_sign_of_work_that_carries_something_ends_the_stream():
    with pytest.raises(ProtocolError, match="sign of life with 3 bytes"):
        Header.unpack(Header(kind=Kind.ALIVE, request_id=0, payload_bytes=3).pack(b"abc"))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_pulse_tells_work_from_waiting():
    """A thread that computes uses CPU time, one that waits none; without work nothing is stuck."""
    clock, release, computing = Clock(), threading.Event(), threading.Event()
    pulse = Pulse(clock)

    def work():
        pulse.begin()
        while not computing.is_set():
            pass
        release.wait(20)
        pulse.end()

    assert pulse.sign().stuck_s == 0.0
    thread = threading.Thread(target=work)
    thread.start()
    assert _until(lambda: pulse.sign().progress > 0)
    before = pulse.sign()
    assert before.busy
    assert _until(lambda: pulse.sign().progress > before.progress)
    computing.set()
    assert _until(lambda: pulse.progress() == pulse.progress())
    time.sleep(0.1)
    stands = pulse.sign()
    clock.now += 40.0
    stuck = pulse.sign()
    assert (stuck.progress, stuck.stuck_s) == (stands.progress, 40.0)
    release.set()
    thread.join()
    after = pulse.sign()
    assert after.progress != stuck.progress
    assert (after.busy, after.stuck_s) == (False, 0.0)


def test_a_computation_that_begins_is_not_stuck_for_the_time_before():
    clock = Clock()
    pulse = Pulse(clock)
    clock.now = 1000.0
    pulse.begin(on_cpu=False)
    clock.now = 1002.0
    assert pulse.sign().stuck_s == 2.0
    pulse.end()
    assert pulse.sign().stuck_s == 0.0


def _until(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False
