"""A shard's end of its streams: one thread that waits, reads what has arrived from all callers, computes, answers.

Requests of one layer that are here together become one product. The oldest waiting request's layer is next, so a
request waits at most for what arrived before it. The thread waits for nothing to make a group larger.

A second thread, the deputy, looks a few times a second. While the first one computes, it does the rest of the work
(callers connect, their requests are read), and tells the callers whose requests wait that the work goes on.
"""

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cluster.errors import ClusterError, ProtocolError, ShardUnavailable
from cluster.experts.pulse import Pulse
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.buffers import ReceiveBuffers, Staging, memory
from cluster.stream.frames import Header, Kind, StreamOffer
from cluster.stream.groups import WaitingRequests, one_batch, staged_parts
from cluster.stream.peer import HANDSHAKE_S, Peer, Request, State
from cluster.stream.sockets import listen, user_of

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 0.25  # between two looks of the deputy; a quarter of what callers wait for, where that is less
MIN_BEAT_S = 0.02


class StreamBackend(Protocol):
    """Computes the rows. Only the server's first thread calls `forward`."""

    device: torch.device

    def forward(self, batch: ExpertBatch, waited_s: float) -> Tensor:
        """[T, H] in the rows' dtype. waited_s: since the oldest of its rows was sent. Raises ClusterError."""


class StreamServer:
    """Listens on a Unix socket (Linux) and on TCP, from `start` to `close`. node: a name of this host.
    pulse: of the backend, where other threads compute with it too."""

    def __init__(
        self,
        backend: StreamBackend,
        *,
        host: str,
        node: str,
        pulse: Pulse | None = None,
        max_group_rows: int = 8192,
        beat_s: float = BEAT_S,
    ) -> None:
        self._backend = backend
        self._pulse = pulse or Pulse()
        self._on_cpu = backend.device.type == "cpu"
        self._beat_s = beat_s
        self._turn = threading.Lock()  # of the thread that uses the fields below; no thread has it during a product
        self._selector = selectors.DefaultSelector()
        self._peers: set[Peer] = set()
        self._waiting = WaitingRequests(max_group_rows)
        self._buffers = ReceiveBuffers(backend.device.type == "cuda")
        self._staging = Staging()
        self._listeners, unix_name = listen(host)
        self._secret = secrets.token_bytes(32)
        self.offer = StreamOffer(unix_name, host, self._listeners[0].getsockname()[1], node, self._secret)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        for sock in (*self._listeners, self._wake_reader):
            self._selector.register(sock, selectors.EVENT_READ)
        self._closing = self._cut = self._damage = False
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._serve, "stream-server"), (self._stand_in, "stream-deputy"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Blocks for the product under way; callers see their connection end. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        self._closed.set()
        self._wake_writer.send(b"x")
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for peer in list(self._peers):
            self._drop(peer)
        for sock in (*self._listeners, self._wake_reader, self._wake_writer):
            sock.close()
        self._selector.close()

    def cut(self) -> None:
        """Ends all connections, as a network may: to rehearse recovery."""
        self._cut = True
        self._wake_writer.send(b"x")

    def damage(self) -> None:
        """Damages the next answer, as a network may: to rehearse recovery."""
        self._damage = True

    @property
    def num_connections(self) -> int:
        return len(self._peers)

    def _serve(self) -> None:
        with self._turn:
            while not self._closing:
                self._read_and_write(0.0 if self._waiting else self._next_deadline_s())
                if self._waiting:
                    self._compute(self._waiting.next_group())

    def _stand_in(self) -> None:
        """The deputy's work."""
        progress = self._pulse.progress()
        while not self._closed.wait(self._beat_s):
            if not self._turn.acquire(timeout=self._beat_s):
                continue  # the first thread has the turn: it computes nothing
            try:
                if not self._closing:
                    self._read_and_write(0.0)
                    before, progress = progress, self._pulse.progress()
                    if progress != before:
                        self._beat()
            finally:
                self._turn.release()

    def _beat(self) -> None:
        """Tells all callers whose requests wait that the work goes on, but for those who do not read their answers."""
        head, now = Header(kind=Kind.ALIVE).pack(), time.monotonic()
        for peer in [p for p in self._peers if p.features & frames.FEATURES and p.waits and not p.outgoing]:
            self._send(peer, head)
            for request in self._waiting.of(peer):
                request.heard_at = now

    def _read_and_write(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.data is not None:
                self._attend_to(key.data, events)
            elif key.fileobj is self._wake_reader:
                self._wake_reader.recv(64)
            else:
                self._accept(key.fileobj)  # type: ignore[arg-type]
        if self._cut:
            self._cut = False
            for peer in list(self._peers):
                self._drop(peer)
        now = time.monotonic()
        for peer in [p for p in self._peers if p.state is State.HELLO and p.deadline <= now]:
            log.warning("a connection is closed: no handshake in %.0f s", HANDSHAKE_S)
            self._drop(peer)

    def _attend_to(self, peer: Peer, events: int) -> None:
        """Writes and reads what the socket allows now."""
        try:
            if events & selectors.EVENT_WRITE:
                peer.write()
            if events & selectors.EVENT_READ:
                for request in peer.read():
                    self._beat_s = max(MIN_BEAT_S, min(self._beat_s, request.timeout_s / 4))
                    self._waiting.add(request)
            self._watch(peer)
        except ProtocolError as error:
            log.warning("a connection is closed: %s", error)
            peer.refuse(str(error))
            self._drop(peer)
        except OSError as error:
            log.info("a caller's connection ended: %s", error)
            self._drop(peer)

    def _next_deadline_s(self) -> float | None:
        """Seconds until the next stranger's time is up; None when there is none."""
        deadlines = [peer.deadline for peer in self._peers if peer.state is State.HELLO]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
            if sock.family == socket.AF_UNIX and (user := user_of(sock)) != os.getuid():
                log.warning("a connection of another user of this machine (uid %d) is closed", user)
                sock.close()
                return
            peer = Peer(sock, self._secret, self._buffers, self._backend.device)
        except OSError as error:  # the stranger has gone again, or this process has too many files open
            log.warning("a connection could not be taken: %s", error)
            return
        self._peers.add(peer)
        self._send(peer, peer.greeting())

    def _compute(self, group: Sequence[Request]) -> None:
        now = time.monotonic()
        for request in [r for r in group if now - r.heard_at >= r.timeout_s]:
            self._answer(request, Kind.UNAVAILABLE, b"the caller's time was over before its rows' turn came")
        group = [r for r in group if now - r.heard_at < r.timeout_s]
        if not group:
            return
        waited_s = max(0.0, time.time() - min(r.head.sent_at for r in group))  # hosts' clocks may differ
        try:
            batch = one_batch(group, self._backend.device)
            out = self._work(lambda: self._backend.forward(batch, waited_s))
        except ShardUnavailable as error:
            self._fail(group, Kind.UNAVAILABLE, str(error))
        except Exception as error:
            if not isinstance(error, ClusterError):
                log.exception("layer %d failed", group[0].head.layer_id)
            self._fail(group, Kind.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._hand_back(group, out)

    def _work(self, work: Callable[[], T]) -> T:
        """Does what may take long; the deputy does everything else meanwhile."""
        self._turn.release()
        self._pulse.begin(on_cpu=self._on_cpu)
        try:
            return work()
        finally:
            self._pulse.end()
            self._turn.acquire()

    def _hand_back(self, group: Sequence[Request], out: Tensor) -> None:
        """Gives each caller his part of a product [T, H]."""
        staged = staged_parts(group, out, self._staging)
        if out.is_cuda:
            self._work(torch.cuda.current_stream(out.device).synchronize)  # a caller reads as soon as he has the frame
        for request, copy in zip(group, staged, strict=True):
            self._answer(request, Kind.ANSWER, memory(copy[0]) if copy else b"")
            if copy and not request.peer.outgoing:
                self._staging.give_back(copy[1])

    def _fail(self, group: Sequence[Request], kind: Kind, message: str) -> None:
        """One caller's wrong ids must not fail the others' rows: a group that fails is computed one by one."""
        if len(group) == 1:
            self._answer(group[0], kind, message.encode())
            return
        for request in group:
            self._compute([request])

    def _answer(self, request: Request, kind: Kind, payload: bytes | memoryview) -> None:
        peer, head = request.peer, request.head
        self._buffers.give(request.buffer)
        peer.num_pending -= 1
        if peer not in self._peers:
            return
        answer = Header(
            kind=kind, request_id=head.request_id, payload_bytes=len(payload), dtype=head.dtype, layer_id=head.layer_id,
            rows=head.rows, hidden_size=head.hidden_size, slot=head.slot if kind is Kind.ANSWER else 0,
        )  # fmt: skip
        packed = answer.pack(payload)
        if self._damage:
            self._damage = False
            packed = packed[:-1] + bytes([packed[-1] ^ 1])
        self._send(peer, packed, payload)

    def _send(self, peer: Peer, *parts: bytes | memoryview) -> None:
        """Never waits: bytes that the socket does not take now go when it takes them."""
        try:
            peer.send(*parts)
            self._watch(peer)
        except OSError as error:
            log.info("a caller's connection ended: %s", error)
            self._drop(peer)

    def _watch(self, peer: Peer) -> None:
        events = peer.events
        if events == peer.watched:
            return
        if not peer.watched:
            self._selector.register(peer.sock, events, peer)
        elif not events:
            self._selector.unregister(peer.sock)
        else:
            self._selector.modify(peer.sock, events, peer)
        peer.watched = events

    def _drop(self, peer: Peer) -> None:
        self._peers.discard(peer)
        if peer.watched:
            self._selector.unregister(peer.sock)
            peer.watched = 0
        peer.close()
        for request in self._waiting.drop(peer):
            self._buffers.give(request.buffer)
