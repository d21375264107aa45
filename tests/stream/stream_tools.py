"""Shared by the tests of streams: a shard that multiplies its rows by layer + 1, and callers good and bad."""

import multiprocessing
import socket
import threading
from contextlib import contextmanager

import torch

from cluster.errors import ShardUnavailable
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.connection import StreamConnection
from cluster.stream.server import StreamServer

HERE, ELSEWHERE = "this host", "another host"
CPU = torch.device("cpu")


class Backend:
    """Records the groups that it computes; waits at the gate before each."""

    device = CPU

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.groups = []

    def forward(self, batch, waited_s):
        self.entered.set()
        assert self.gate.wait(20)
        self.groups.append((batch.layer_id, batch.hidden_states.shape[0]))
        if batch.topk_ids.max() == 7:
            raise ShardUnavailable("expert 7 is not here", 0)
        if batch.topk_ids.max() == 8:
            raise ValueError("a bug")
        return batch.hidden_states * (batch.layer_id + 1)


def batch(rows=3, layer_id=1, expert=0, dtype=torch.float32, hidden_size=6, device=CPU):
    return ExpertBatch(
        layer_id=layer_id, epoch=5, hidden_states=torch.randn(rows, hidden_size, device=device).to(dtype),
        topk_ids=torch.full((rows, 2), expert, device=device), topk_weights=torch.rand(rows, 2, device=device),
    )  # fmt: skip


def connect(server, node=HERE):
    return StreamConnection(server.offer, 0, node, CPU)


def answer(connection, sent, timeout_s=20.0):
    return connection.receive(connection.send(sent), sent.hidden_states, timeout_s)


def proven(server):
    """A raw socket after the handshake."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(f"\0{server.offer.unix_name}")
    _, _, _, nonce = frames.GREETING.unpack(sock.recv(frames.GREETING.size, socket.MSG_WAITALL))
    proof = frames.mac(server.offer.secret, b"client", nonce)
    sock.sendall(frames.HELLO.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, b"o" * 32, proof))
    sock.recv(frames.WELCOME.size, socket.MSG_WAITALL)
    return sock


def read_all(sock):
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


@contextmanager
def shard_in_a_process(device):
    """The offer of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, device), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(pipe, device):
    backend = Backend()
    backend.device = device
    server = StreamServer(backend, host="127.0.0.1", node=HERE)
    server.start()
    pipe.send(server.offer)
    threading.Event().wait()
