"""Rows in memory that a caller and a server share; as in test_stream a shard multiplies its rows by layer + 1."""

import fcntl
import json
import os
import socket

import pytest
import torch
from stream_tools import CPU, ELSEWHERE, HERE, Backend, answer, batch, connect, proven, read_all, shard_in_a_process

from cluster.errors import ProtocolError
from cluster.stream import region as regions
from cluster.stream.connection import StreamConnection
from cluster.stream.frames import HELLO, Header, Kind
from cluster.stream.region import NUM_SLOTS, REGION_BYTES, SLOT_BYTES, make_region, open_region
from cluster.stream.server import StreamServer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")


def test_one_side_reads_the_rows_that_the_other_writes():
    ours = make_region(CPU)
    other = open_region(ours.descriptor, ours.fds, CPU)
    ours.close_fds()
    ours.rows(2, 3, 5, torch.bfloat16).fill_(1.5)
    assert torch.equal(other.rows(2, 3, 5, torch.bfloat16), torch.full((3, 5), 1.5, dtype=torch.bfloat16))
    assert not other.memory[:SLOT_BYTES].any()


def test_within_a_host_rows_go_through_shared_memory_and_between_hosts_through_the_socket(server):
    here, elsewhere = connect(server, HERE), connect(server, ELSEWHERE)
    assert here._region is not None
    assert elsewhere._region is None
    sent = batch()
    value = answer(here, sent)
    assert here._region.memory.data_ptr() <= value.data_ptr() < here._region.memory.data_ptr() + REGION_BYTES
    assert torch.equal(value, sent.hidden_states * 2)


def test_more_batches_than_slots_and_rows_larger_than_one_go_through_the_socket(server, backend):
    connection = connect(server)
    backend.gate.clear()
    sent = [batch(layer_id=i) for i in range(NUM_SLOTS + 3)]
    flights = [connection.send(one) for one in sent]
    backend.gate.set()
    for flight, one in zip(flights, sent, strict=True):
        assert torch.equal(connection.receive(flight, one.hidden_states, 20.0), one.hidden_states * (one.layer_id + 1))
    large = batch(1100, hidden_size=4096)
    assert large.hidden_states.nbytes > SLOT_BYTES
    assert torch.equal(answer(connection, large), large.hidden_states * 2)
    for _ in range(3 * NUM_SLOTS):
        assert torch.equal(answer(connection, sent[0]), sent[0].hidden_states)
    assert len(connection._region._free) == NUM_SLOTS - 1  # the last answer's is still looked at


def test_the_slot_of_an_answer_that_comes_too_late_is_free_again(server, backend):
    connection = connect(server)
    backend.gate.clear()
    sent = batch()
    late = connection.send(sent)
    with pytest.raises(TimeoutError):
        connection.receive(late, sent.hidden_states, 0.05)
    assert len(connection._region._free) == NUM_SLOTS - 1
    backend.gate.set()
    answer(connection, sent)
    answer(connection, sent)
    assert len(connection._region._free) == NUM_SLOTS - 1


def test_a_shard_that_cannot_open_the_memory_gets_rows_through_the_socket(server, monkeypatch, caplog):
    def refuse(descriptor, fds, device):
        raise ProtocolError("no such memory")

    monkeypatch.setattr("cluster.stream.peer.open_region", refuse)
    connection = connect(server)
    assert connection._region is None
    sent = batch()
    assert torch.equal(answer(connection, sent), sent.hidden_states * 2)
    assert "rows go to shard 0 through a socket: no such memory" in caplog.text


@pytest.mark.parametrize(
    "descriptor", [b"\xff", b"{}", b"[]", b'{"kind": "file"}', b'{"kind": "cuda"}', b'{"kind": 1}']
)
def test_a_description_of_nothing_is_refused(descriptor):
    with pytest.raises(ProtocolError):
        open_region(descriptor, (), CPU)


def test_a_file_that_could_shrink_under_its_reader_is_refused():
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, REGION_BYTES)
    with pytest.raises(ProtocolError, match="not sealed"):
        open_region(json.dumps({"kind": "file"}).encode(), (fd,), CPU)
    fcntl.fcntl(fd, regions._ADD_SEALS, regions._SEALS)
    open_region(json.dumps({"kind": "file"}).encode(), (fd,), CPU)
    os.close(fd)


def test_a_slot_of_memory_that_was_not_shared_or_that_is_too_small_is_refused(server):
    for slot, rows, reason in (
        (1, 1, b"was not shared"),
        (NUM_SLOTS + 1, 1, b"does not hold"),
        (1, 1 << 24, b"does not"),
    ):
        raw = proven(server)
        sizes = {"rows": rows, "hidden_size": 3, "topk": 2, "slot": slot}
        raw.sendall(Header(kind=Kind.REQUEST, request_id=1, payload_bytes=rows * 16, **sizes).pack())  # the head only
        assert reason in read_all(raw)


def test_memory_is_shared_once(server):
    raw, region = proven(server), make_region(CPU)
    head = Header(kind=Kind.SHARE, request_id=0, payload_bytes=len(region.descriptor)).pack(region.descriptor)
    for _ in range(2):
        socket.send_fds(raw, [head + region.descriptor], region.fds)
    assert b"twice" in read_all(raw)
    region.close_fds()


def test_descriptors_of_strangers_and_of_callers_that_are_gone_are_closed():
    made = StreamServer(Backend(), host="127.0.0.1", node=HERE)
    made.start()
    before = 0
    for round_ in range(12):
        if round_ == 2:  # those before it opened what stays open, and may not have closed everything yet
            before = len(os.listdir("/proc/self/fd"))
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(f"\0{made.offer.unix_name}")
            stranger.recv(4096)
            socket.send_fds(stranger, [b"x" * HELLO.size], [0, 0])
            assert stranger.recv(4096) == b""
        connection = connect(made)
        answer(connection, batch())
        connection.close()
        del connection
        while made.num_connections:
            pass
    assert len(os.listdir("/proc/self/fd")) < before + 10, "every round left a descriptor open"
    made.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_a_gpu_are_read_by_another_process_through_cuda_ipc(dtype):
    """CUDA does not open a handle in the process that made it: the shard is a process of its own."""
    device = torch.device("cuda")
    with shard_in_a_process(device) as offer:
        connection = StreamConnection(offer, 0, HERE, device)
        assert connection._region is not None
        for rows in (1, 64, 2000):
            sent = batch(rows, hidden_size=2048, dtype=dtype, device=device)
            assert torch.equal(answer(connection, sent), sent.hidden_states * 2)
        connection.close()
