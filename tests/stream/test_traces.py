"""The spans to which a caller's requests belong, on a stream: the shard counts its products for them, for no others."""

import socket
import threading
import time

import pytest
import torch
from stream_tools import CPU, HERE, Backend, answer, batch, connect
from test_steady import Backend as SteadyBackend
from test_steady import ask, until, warmed
from test_steady import batch as steady_batch

from cluster.kernels.native import library
from cluster.kernels.native.serving import can_serve
from cluster.runtime.workers.transports import RayTransport, decode, trace_of
from cluster.stream import frames
from cluster.stream.client import StreamTransport
from cluster.stream.connection import StreamBroken
from cluster.stream.frames import Header, Kind
from cluster.stream.peer import MAX_TRACE_BYTES
from cluster.stream.server import StreamServer
from cluster.stream.sockets import has_room
from cluster.stream.steady import STEADY
from cluster.tracing.contexts import Place, pack

FIRST, SECOND = [Place(1, 2), Place(3, 4)], [Place(5, 6)]


class Traced:
    """Rows of the products for each step's spans."""

    def __init__(self):
        self.rows, self.began = {}, {}

    def __call__(self, packed, began, products):
        self.rows.setdefault(packed, []).extend(rows for rows, _, _ in products)
        self.began.setdefault(packed, began)
        assert all(waited_s >= 0 and computed_s > 0 for _, waited_s, computed_s in products)


@pytest.fixture
def traced():
    return Traced()


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def server(backend, traced):
    made = StreamServer(backend, host="127.0.0.1", node=HERE, on_traced=traced)
    made.start()
    yield made
    made.close()


def test_products_count_for_the_spans_that_were_named_before_them(server, traced):
    connection = connect(server)
    answer(connection, batch(rows=1))
    before = time.time_ns()
    connection.trace(pack(FIRST))
    answer(connection, batch(rows=2))
    answer(connection, batch(rows=3))
    connection.trace(pack(SECOND))
    answer(connection, batch(rows=4))
    connection.trace(b"")
    answer(connection, batch(rows=5))
    assert traced.rows == {pack(FIRST): [2, 3], pack(SECOND): [4]}
    assert all(before <= began <= time.time_ns() for began in traced.began.values())


def test_of_requests_computed_together_only_the_traced_ones_count(server, backend, traced):
    connections = [connect(server) for _ in range(3)]
    backend.gate.clear()
    blocking = threading.Thread(target=answer, args=(connections[0], batch(layer_id=9)))
    blocking.start()
    assert backend.entered.wait(20)
    connections[1].trace(pack(FIRST))
    sent = [(each, batch(rows=rows)) for each, rows in zip(connections[1:], (3, 4), strict=True)]
    ids = [each.send(one) for each, one in sent]
    backend.gate.set()
    for (each, one), request_id in zip(sent, ids, strict=True):
        each.receive(request_id, one.hidden_states, 20.0)
    blocking.join()
    assert traced.rows == {pack(FIRST): [3]}


@pytest.mark.skipif(library.native() is None or not can_serve(), reason="the native kernels are not built")
def test_the_native_loop_answers_traced_requests_too(traced):
    backend = SteadyBackend()
    server = StreamServer(backend, host="127.0.0.1", node=HERE, steady=backend, on_traced=traced, beat_s=0.05)
    server.start()
    try:
        connection = warmed(server)
        for places in (FIRST, SECOND):
            connection.trace(pack(places))
            for _ in range(24):
                ask(connection, steady_batch(rows=2))
            connection.trace(b"")
        ask(connection, steady_batch(rows=7))
        until(lambda: len(traced.rows.get(pack(SECOND), ())) == 24)
        assert traced.rows == {pack(places): [2] * 24 for places in (FIRST, SECOND)}
        assert backend.in_python <= STEADY + 5  # those that came with a frame of names
    finally:
        server.close()


def test_an_older_shard_is_not_told(server, traced, monkeypatch):
    monkeypatch.setattr(frames, "FEATURES", frames.SIGNS)  # as it greets
    connection = connect(server)
    connection.trace(pack(FIRST))
    answer(connection, batch())
    assert traced.rows == {}


def test_a_frame_of_names_that_is_too_large_ends_the_connection(server, caplog):
    connection = connect(server)
    connection._sock.sendall(Header(kind=Kind.TRACE, payload_bytes=MAX_TRACE_BYTES + 1).pack())
    with pytest.raises(StreamBroken):
        for _ in range(2):  # the first may still find room in the socket
            answer(connection, batch())
    assert "a frame of kind TRACE with 65537 bytes" in caplog.text


def test_a_shard_that_does_not_read_hears_of_begins_and_ends_with_the_next_rows(server, traced, monkeypatch):
    connection = connect(server)
    monkeypatch.setattr("cluster.stream.connection.has_room", lambda sock: False)
    connection.trace(pack(FIRST))
    answer(connection, batch(rows=1))
    connection.trace(b"")
    answer(connection, batch(rows=2))
    connection.trace(pack(SECOND))
    connection.trace(b"")  # a step without rows for this shard
    answer(connection, batch(rows=3))
    assert traced.rows == {pack(FIRST): [1]}


def test_a_socket_has_room_until_it_is_full():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    assert has_room(ours)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1 << 12))
    assert not has_room(ours)
    ours.close()
    theirs.close()


class Offers:
    """One shard, which is replaced when `number` changes."""

    def __init__(self, server):
        self.server, self.number = server, 1

    def incarnation(self, shard_id):
        return self.number

    def offer(self, shard_id):
        return self.server.offer


def test_a_transport_tells_open_connections_and_those_that_follow(server, traced):
    offers = Offers(server)
    transport = StreamTransport(offers, node=HERE, fallback=None, timeout_s=20.0)

    def send(rows):
        transport.submit(0, batch(rows=rows)).result(20.0)

    send(1)
    transport.trace({0: pack(FIRST), 1: pack(SECOND)})
    send(2)
    offers.number += 1  # a successor
    send(3)
    transport.trace({})
    send(4)
    offers.number += 1
    send(5)
    transport.close()
    assert traced.rows == {pack(FIRST): [2, 3]}


# The other carrier


class Actor:
    """Keeps what its `forward` is called with."""

    def __init__(self):
        self.forward = self
        self.calls = []

    def remote(self, *wire):
        self.calls.append(wire)


class Handles:
    """Shard 0 is of this version, shard 1 of an older one."""

    def __init__(self):
        self.actors = [Actor(), Actor()]

    def handle(self, shard_id):
        return self.actors[shard_id]

    def takes_traces(self, shard_id):
        return shard_id == 0


def test_a_ray_call_takes_its_spans_along_to_shards_that_know_them():
    handles, sent = Handles(), batch(rows=2)
    carrier = RayTransport(handles)
    for places in ({}, {0: pack(FIRST), 1: pack(FIRST)}, {}):
        carrier.trace(places)
        for shard_id in range(2):
            carrier.submit(shard_id, sent)
    new, old = ([trace_of(wire) for wire in actor.calls] for actor in handles.actors)
    assert (new, old) == ([b"", pack(FIRST), b""], [b"", b"", b""])
    assert {len(wire) for wire in handles.actors[1].calls} == {8}  # as an older version takes them
    assert torch.equal(decode(handles.actors[0].calls[1], CPU).hidden_states, sent.hidden_states)
