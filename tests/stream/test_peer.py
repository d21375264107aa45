"""One caller's connection without a server: its bytes come one by one, or more than it may send."""

import selectors
import socket

import pytest
import torch
from stream_tools import CPU

from cluster.errors import ProtocolError
from cluster.stream import frames
from cluster.stream.buffers import ReceiveBuffers
from cluster.stream.frames import HEADER, Header, Kind
from cluster.stream.peer import MAX_PENDING, Peer, State
from cluster.stream.region import make_region

SECRET = b"s" * 32


@pytest.fixture
def ends():
    """The caller's socket, and the shard's `Peer`."""
    caller, theirs = socket.socketpair()
    caller.settimeout(20)
    peer = Peer(theirs, SECRET, ReceiveBuffers(False), CPU)
    yield caller, peer
    peer.close()
    caller.close()


def hello(peer):
    nonce = frames.GREETING.unpack(peer.greeting())[3]
    proof = frames.mac(SECRET, b"client", nonce)
    return frames.HELLO.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, b"n" * 32, proof)


def request(request_id=1):
    """One row of two float32 for one expert."""
    parts = bytes(4), bytes(4), torch.tensor([1.0, 2.0]).numpy().tobytes()
    head = Header(kind=Kind.REQUEST, request_id=request_id, payload_bytes=16, rows=1, hidden_size=2, topk=1)
    return head.pack(*parts) + b"".join(parts)


def test_bytes_that_come_one_by_one_lead_from_state_to_state(ends):
    caller, peer = ends
    states, requests = [], []
    for byte in hello(peer) + request() + request(2):
        states.append(peer.state)
        caller.sendall(bytes([byte]))
        requests += peer.read()
    part = [State.HEAD] * HEADER.size + [State.REQUEST] * 16
    assert states == [State.HELLO] * frames.HELLO.size + part + part
    assert [one.head.request_id for one in requests] == [1, 2]
    assert requests[0].batch(CPU).hidden_states.tolist() == [[1.0, 2.0]]
    assert caller.recv(100)[:4] == b"moeX", "the welcome"


def test_from_a_caller_with_many_requests_no_more_are_read_until_one_is_answered(ends):
    caller, peer = ends
    caller.sendall(hello(peer) + b"".join(request(i) for i in range(MAX_PENDING + 2)))
    assert len(list(peer.read())) == MAX_PENDING
    assert (peer.events, list(peer.read())) == (0, [])
    peer.num_pending -= 1
    assert peer.events == selectors.EVENT_READ
    assert [one.head.request_id for one in peer.read()] == [MAX_PENDING]


def test_a_caller_waits_from_the_first_byte_of_his_request_on(ends):
    caller, peer = ends
    caller.sendall(hello(peer))
    list(peer.read())
    assert not peer.waits
    caller.sendall(request()[:1])
    list(peer.read())
    assert peer.waits


def test_shared_memory_is_opened_once_its_description_is_whole(ends):
    caller, peer = ends
    region = make_region(CPU)
    caller.sendall(hello(peer))
    list(peer.read())
    head = Header(kind=Kind.SHARE, request_id=3, payload_bytes=len(region.descriptor)).pack(region.descriptor)
    socket.send_fds(caller, [head], region.fds)
    list(peer.read())
    assert (peer.state, peer.region) == (State.SHARE, None)
    caller.sendall(region.descriptor)
    list(peer.read())
    assert peer.state is State.HEAD
    region.rows(1, 1, 2, torch.float32).fill_(7.0)
    assert peer.region.rows(1, 1, 2, torch.float32).tolist() == [[7.0, 7.0]]
    caller.recv(frames.WELCOME.size, socket.MSG_WAITALL)
    answer = Header.unpack(caller.recv(HEADER.size, socket.MSG_WAITALL))
    assert (answer.kind, answer.request_id) == (Kind.ANSWER, 3)
    region.close_fds()


def test_a_caller_hears_why_he_is_refused_and_a_stranger_hears_nothing(ends):
    caller, peer = ends
    peer.refuse("no")
    caller.setblocking(False)
    with pytest.raises(BlockingIOError):
        caller.recv(1)
    caller.setblocking(True)
    caller.sendall(hello(peer) + Header(kind=Kind.ANSWER, request_id=1, payload_bytes=0).pack())
    with pytest.raises(ProtocolError, match="of kind ANSWER") as raised:
        list(peer.read())
    caller.recv(frames.WELCOME.size, socket.MSG_WAITALL)
    peer.refuse(str(raised.value))
    head = Header.unpack(caller.recv(HEADER.size, socket.MSG_WAITALL))
    assert (head.kind, caller.recv(100)) == (Kind.REFUSED, b"a caller sent a frame of kind ANSWER")


def test_bytes_that_the_socket_does_not_take_wait_in_their_order(ends):
    caller, peer = ends
    sent = bytes(range(256)) * (1 << 16)
    peer.send(sent[: len(sent) // 2])
    peer.send(sent[len(sent) // 2 :])
    assert peer.events & selectors.EVENT_WRITE
    received = b""
    while len(received) < len(sent):
        received += caller.recv(1 << 20)
        peer.write()
    assert received == sent
    assert not peer.outgoing
