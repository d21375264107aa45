"""Streams between a client and a server in this process; a shard of these tests multiplies its rows by layer + 1."""

import pickle
import socket
import struct
import threading
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_tools import CPU, ELSEWHERE, HERE, Backend, answer, batch, connect, proven, read_all

from cluster.errors import ClusterError, ProtocolError, ShardUnavailable
from cluster.stream import frames
from cluster.stream.client import StreamTransport
from cluster.stream.connection import StreamBroken, StreamConnection
from cluster.stream.frames import HEADER, Header, Kind, StreamOffer
from cluster.stream.server import StreamServer


@pytest.mark.parametrize("node", [HERE, ELSEWHERE], ids=["unix", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4000, 512)])
def test_rows_come_back_as_they_were_computed(server, node, dtype, shape):
    connection = connect(server, node)
    for _ in range(3):  # buffers are used again
        sent = batch(shape[0], dtype=dtype, hidden_size=shape[1])
        assert torch.equal(answer(connection, sent), sent.hidden_states * 2)
    connection.close()


def test_answers_may_be_asked_for_in_another_order(server):
    connection = connect(server)
    first, second = batch(2, layer_id=1), batch(3, layer_id=2)
    ids = [connection.send(first), connection.send(second)]
    assert torch.equal(connection.receive(ids[1], second.hidden_states, 20), second.hidden_states * 3)
    assert torch.equal(connection.receive(ids[0], first.hidden_states, 20), first.hidden_states * 2)
    connection.close()


def test_requests_of_one_layer_are_one_product_and_the_oldest_layer_is_first(server, backend):
    backend.gate.clear()
    callers = [connect(server) for _ in range(4)]
    sent = [batch(1, layer_id=9), batch(2, layer_id=1), batch(3, layer_id=0), batch(4, layer_id=1)]
    ids = [callers[0].send(sent[0])]
    assert backend.entered.wait(20)
    for caller, one in zip(callers[1:], sent[1:], strict=True):
        ids.append(caller.send(one))
    backend.gate.set()
    for caller, request_id, one in zip(callers, ids, sent, strict=True):
        rows = caller.receive(request_id, one.hidden_states, 20)
        assert torch.equal(rows, one.hidden_states * (one.layer_id + 1))
    assert sorted(backend.groups) == [(0, 3), (1, 6), (9, 1)]
    for caller in callers:
        caller.close()


@pytest.mark.parametrize(("expert", "error"), [(7, ShardUnavailable), (8, ClusterError)])
def test_an_error_reaches_its_caller_and_no_other(server, backend, expert, error):
    backend.gate.clear()
    first, wrong, right = connect(server), connect(server), connect(server)
    opening, bad, good = batch(1, layer_id=0), batch(2, expert=expert), batch(2)
    first_id = first.send(opening)
    assert backend.entered.wait(20)
    ids = wrong.send(bad), right.send(good)
    backend.gate.set()
    with pytest.raises(error):
        wrong.receive(ids[0], bad.hidden_states, 20)
    assert torch.equal(right.receive(ids[1], good.hidden_states, 20), good.hidden_states * 2)
    assert torch.equal(first.receive(first_id, opening.hidden_states, 20), opening.hidden_states)
    assert torch.equal(answer(wrong, good), good.hidden_states * 2)  # its connection lives on
    for connection in (first, wrong, right):
        connection.close()


def test_rows_whose_time_is_over_are_not_computed(server, backend):
    backend.gate.clear()
    connection = connect(server)
    opening, late = batch(1, layer_id=0), batch(2)
    first_id = connection.send(opening)
    assert backend.entered.wait(20)
    late_id = connection.send(late, timeout_s=0.0)
    backend.gate.set()
    connection.receive(first_id, opening.hidden_states, 20)
    with pytest.raises(ShardUnavailable, match="time was over"):
        connection.receive(late_id, late.hidden_states, 20)
    assert backend.groups == [(0, 1)]
    connection.close()


def test_an_answer_that_comes_after_its_time_is_dropped(server, backend):
    backend.gate.clear()
    connection = connect(server)
    slow, next_one = batch(2), batch(2)
    with pytest.raises(TimeoutError):
        answer(connection, slow, timeout_s=0.05)
    backend.gate.set()
    assert torch.equal(answer(connection, next_one), next_one.hidden_states * 2)
    connection.close()


def test_a_wrong_secret_is_refused_on_both_sides(server, caplog):
    offer = server.offer
    stranger = StreamOffer(offer.unix_name, offer.host, offer.port, offer.node, b"x" * 32)
    with pytest.raises((ConnectionResetError, ProtocolError)):
        StreamConnection(stranger, 0, HERE, CPU)
    assert torch.is_tensor(answer(connect(server), batch()))
    assert "does not know this shard's secret" in caplog.text


def test_a_server_that_does_not_know_the_secret_is_refused(backend):
    """A process that takes over a dead shard's port can greet, but not prove itself."""
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor():
        sock, _ = listener.accept()
        sock.sendall(frames.GREETING.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, b"n" * 32))
        sock.recv(frames.HELLO.size)
        sock.sendall(frames.WELCOME.pack(frames.MAGIC, frames.VERSION, b"m" * 32))
        sock.close()

    threading.Thread(target=impostor, daemon=True).start()
    with pytest.raises(ProtocolError, match="does not know its secret"):
        StreamConnection(StreamOffer("", "127.0.0.1", listener.getsockname()[1], HERE, b"s" * 32), 0, HERE, CPU)
    listener.close()


def test_another_version_is_refused_with_both_numbers(server, monkeypatch, caplog):
    monkeypatch.setattr(frames, "VERSION", 3)
    head = Header(kind=Kind.REQUEST, request_id=1, payload_bytes=28, rows=1, hidden_size=3, topk=2).pack()
    monkeypatch.undo()
    with pytest.raises(ProtocolError, match=r"version 3 .* this one 2"):
        Header.unpack(head)
    raw = proven(server)
    raw.sendall(head)
    assert b"version 3" in read_all(raw)
    assert "version 3" in caplog.text


def test_an_oversized_frame_is_refused_before_anything_is_allocated(server):
    raw = proven(server)
    rows, hidden_size, topk = 1 << 30, 1 << 10, 2
    head = Header(
        kind=Kind.REQUEST, request_id=1, rows=rows, hidden_size=hidden_size, topk=topk,
        payload_bytes=rows * (4 * hidden_size + 8 * topk),
    )  # fmt: skip
    raw.sendall(head.pack())
    answer = read_all(raw)
    assert Header.unpack(answer[: HEADER.size]).kind is Kind.REFUSED
    assert b"at most" in answer


@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_a_request_without_rows_or_experts_is_refused(server, sizes):
    rows, hidden_size, topk = sizes
    raw = proven(server)
    num_bytes = rows * (4 * hidden_size + 8 * topk)
    raw.sendall(
        Header(
            kind=Kind.REQUEST, request_id=1, payload_bytes=num_bytes, rows=rows, hidden_size=hidden_size, topk=topk
        ).pack()
    )  # fmt: skip
    assert b"which its shapes do not give" in read_all(raw)


@given(data=st.binary(min_size=1, max_size=300), change=st.integers(0, HEADER.size - 1), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_harms_nobody_else(server, data, change, byte):
    """Noise instead of a handshake, noise instead of a frame, a good frame with one byte of its head changed."""
    neighbour = connect(server)
    stranger = socket.create_connection((server.offer.host, server.offer.port))
    stranger.sendall(data + b"\0" * 100)
    caller = proven(server)
    good = Header(kind=Kind.REQUEST, request_id=1, payload_bytes=28, rows=1, hidden_size=3, topk=2).pack()
    caller.sendall(good[:change] + bytes([byte]) + good[change + 1 :] + data)
    sent = batch()
    assert torch.equal(answer(neighbour, sent), sent.hidden_states * 2)
    for sock in (stranger, caller, neighbour):
        sock.close()


def test_a_stranger_who_leaves_before_he_is_greeted_harms_nobody(backend):
    """He has connected and gone when the server looks for the first time: its greeting meets a closed socket."""
    server = StreamServer(backend, host="127.0.0.1", node=HERE)
    for family, address in (
        (socket.AF_UNIX, f"\0{server.offer.unix_name}"),
        (socket.AF_INET, (server.offer.host, server.offer.port)),
    ):
        with socket.socket(family) as stranger:
            stranger.connect(address)
            if family == socket.AF_INET:  # ended by a reset
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.start()
    sent = batch()
    assert torch.equal(answer(connect(server), sent), sent.hidden_states * 2)
    server.close()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_loaded_neither_from_a_stranger_nor_from_a_caller(server, tmp_path):
    """Instead of a handshake; instead of a frame; as a request's rows; as the description of shared memory."""
    bomb = pickle.dumps(Bomb(str(tmp_path / "it works")))
    pickle.loads(bomb)
    assert (tmp_path / "it works").exists()
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    bomb += b"." * (-len(bomb) % 4)
    request = Header(
        kind=Kind.REQUEST, request_id=1, payload_bytes=len(bomb) + 8, rows=1, hidden_size=len(bomb) // 4, topk=1
    )
    share = Header(kind=Kind.SHARE, request_id=1, payload_bytes=len(bomb))
    stranger = socket.create_connection((server.offer.host, server.offer.port))
    stranger.sendall(bomb + b"." * 100)
    with suppress(ConnectionResetError):
        read_all(stranger)
    callers = [proven(server) for _ in range(3)]
    callers[0].sendall(bomb + b"." * HEADER.size)
    callers[1].sendall(request.pack(b"\0" * 4, b"\0" * 4, bomb) + b"\0" * 8 + bomb)
    callers[2].sendall(share.pack(bomb) + bomb)
    heads = [Header.unpack(caller.recv(HEADER.size, socket.MSG_WAITALL)) for caller in callers]
    assert [head.kind for head in heads] == [Kind.REFUSED, Kind.ANSWER, Kind.FAILED]
    assert not (tmp_path / "boom").exists()


class Offers:
    def __init__(self, server):
        self.server, self.number, self.asked = server, 1, 0

    def incarnation(self, shard_id):
        return self.number

    def offer(self, shard_id):
        self.asked += 1
        return self.server.offer


class Fallback:
    """Another way to the same answer; counts its use."""

    def __init__(self):
        self.used = 0

    def submit(self, shard_id, sent):
        self.used += 1
        return self.Ready(sent.hidden_states * (sent.layer_id + 1))

    class Ready:
        def __init__(self, value):
            self.value = value

        def result(self, timeout_s):
            return self.value

    def close(self):
        pass


def test_a_stream_that_breaks_costs_one_step_the_fallback_and_is_made_again(server, backend):
    fallback, offers = Fallback(), Offers(server)
    transport = StreamTransport(offers, node=HERE, fallback=fallback, timeout_s=20.0)
    sent = batch()
    assert torch.equal(transport.submit(0, sent).result(20), sent.hidden_states * 2)
    backend.gate.clear()
    flight = transport.submit(0, sent)
    assert backend.entered.wait(20)
    flight.connection._sock.shutdown(socket.SHUT_RDWR)
    assert torch.equal(flight.result(20), sent.hidden_states * 2)
    assert fallback.used == 1
    backend.gate.set()
    assert torch.equal(transport.submit(0, sent).result(20), sent.hidden_states * 2)
    assert (fallback.used, offers.asked) == (1, 2)
    transport.close()


def test_without_a_fallback_a_broken_stream_is_a_lost_shard(server, backend):
    backend.gate.clear()
    transport = StreamTransport(Offers(server), node=HERE, fallback=None, timeout_s=20.0)
    flight = transport.submit(0, batch())
    flight.connection._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ShardUnavailable, match="stream to shard 0 is down"):
        flight.result(20)
    transport.close()


def test_a_server_that_cannot_be_reached_is_not_tried_at_every_step(server):
    now = [0.0]
    fallback, offers = Fallback(), Offers(server)
    offers.server = type("Gone", (), {"offer": StreamOffer("", "127.0.0.1", 1, HERE, b"")})
    transport = StreamTransport(offers, node=HERE, fallback=fallback, timeout_s=20.0, clock=lambda: now[0])
    for _ in range(3):
        transport.submit(0, batch()).result(20)
    assert (fallback.used, offers.asked) == (3, 1)
    now[0] = 1.5
    offers.server = server
    transport.submit(0, batch()).result(20)
    assert (fallback.used, offers.asked) == (3, 2)
    transport.close()


def test_after_a_shard_its_successor_is_connected_to(server, backend):
    other = StreamServer(Backend(), host="127.0.0.1", node=HERE)
    other.start()
    offers = Offers(server)
    transport = StreamTransport(offers, node=HERE, fallback=None, timeout_s=20.0)
    transport.submit(0, batch()).result(20)
    offers.server, offers.number = other, 2
    transport.submit(0, batch()).result(20)
    assert len(backend.groups) == 1
    transport.close()
    other.close()


def test_a_dead_server_is_noticed_while_waiting(server, backend):
    backend.gate.clear()
    connection = connect(server)
    request_id = connection.send(batch())
    assert backend.entered.wait(20)
    threading.Timer(0.1, backend.gate.set).start()
    server.close()
    sent = batch()
    with pytest.raises(StreamBroken):
        connection.receive(request_id, sent.hidden_states, 20)
        connection.receive(connection.send(sent), sent.hidden_states, 20)


class DamagingProxy:
    """Carries a stream over TCP and changes one byte that comes from one side, at `place`."""

    def __init__(self, target, place, from_server):
        self.place, self.from_server = place, from_server
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.target = target
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self):
        return self.listener.getsockname()[1]

    def _accept(self):
        client, _ = self.listener.accept()
        server = socket.create_connection(self.target)
        for source, sink, damages in ((client, server, not self.from_server), (server, client, self.from_server)):
            threading.Thread(target=self._carry, args=(source, sink, damages), daemon=True).start()

    def _carry(self, source, sink, damages):
        seen = 0
        try:
            while data := source.recv(65536):
                if damages and seen <= self.place < seen + len(data):
                    at = self.place - seen
                    data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
                seen += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for sock in (source, sink):
            sock.close()


HELLO_BYTES, GREETING_BYTES = frames.HELLO.size, frames.GREETING.size + frames.WELCOME.size


@pytest.mark.parametrize("from_server", [False, True])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_that_changes_on_its_way_never_changes_an_answer(server, from_server, data):
    """Head or payload, question or answer: the stream ends, and the rows come over the fallback."""
    sent = batch(rows=20, hidden_size=64)
    payload = 20 * 64 * 4 + (0 if from_server else 20 * 2 * 8)
    start = GREETING_BYTES if from_server else HELLO_BYTES
    place = start + data.draw(st.integers(0, HEADER.size + payload - 1))
    proxy = DamagingProxy((server.offer.host, server.offer.port), place, from_server)
    offers, fallback = Offers(server), Fallback()
    offers.server = type("Far", (), {"offer": StreamOffer("", "127.0.0.1", proxy.port, HERE, server.offer.secret)})
    transport = StreamTransport(offers, node=HERE, fallback=fallback, timeout_s=20.0)
    assert torch.equal(transport.submit(0, sent).result(20.0), sent.hidden_states * 2)
    assert fallback.used == 1
    transport.close()
