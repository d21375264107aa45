"""A shard's end of its streams: one thread that waits, reads what has arrived from all callers, computes, answers.

Requests of one layer that are there together become one product; the oldest waiting request's layer is next, so
nobody waits for more than what arrived before him. Nothing is waited for to make a group larger.

A second thread, the deputy, looks a few times a second. While the first one computes, it does the rest of the work
(callers connect, their requests are read), and tells those whose requests wait that the work goes on.
"""

import array
import logging
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cluster.errors import ClusterError, ProtocolError, ShardUnavailable
from cluster.experts.pulse import Pulse
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.frames import HEADER, NO_TIMEOUT, Header, Kind, ReceiveBuffers, Staging, StreamOffer
from cluster.stream.region import Region, open_region

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 0.25  # between two looks of the deputy; a quarter of what callers wait for, where that is less
MIN_BEAT_S = 0.02
HANDSHAKE_S = 5.0  # for a stranger to prove himself
MAX_DESCRIPTOR_BYTES = 1 << 16  # of shared memory
MAX_PENDING = 8  # requests of one caller that wait here; then nothing more is read from him
_ANCILLARY_BYTES = socket.CMSG_SPACE(16)  # for a few file descriptors; the kernel closes those that find no room
SOCKET_BUFFER_BYTES = 1 << 22  # a prefill chunk goes in few writes


class StreamBackend(Protocol):
    """What computes. `forward` is called by the server's thread only."""

    device: torch.device

    def forward(self, batch: ExpertBatch, waited_s: float) -> Tensor:
        """[T, H] in the rows' dtype. waited_s: since the oldest of its rows was sent. Raises ClusterError."""


@dataclass(slots=True)
class _Request:
    """A whole request, waiting for its turn. heard_at: when its caller was last told that the work goes on, or it came;
    after that he waits for timeout_s."""

    peer: "_Peer"
    header: Header
    buffer: Tensor
    timeout_s: float
    heard_at: float

    def batch(self, device: torch.device) -> ExpertBatch:
        head = self.header
        ids_bytes = head.rows * head.topk * 4
        ids, weights = (self.buffer[i * ids_bytes : (i + 1) * ids_bytes] for i in range(2))
        if head.slot:
            assert self.peer.region is not None
            rows = self.peer.region.rows(head.slot, head.rows, head.hidden_size, head.dtype)
        else:
            rows = self.buffer[2 * ids_bytes : head.payload_bytes].view(head.dtype).view(head.rows, -1)
        return ExpertBatch(
            layer_id=head.layer_id,
            epoch=head.epoch,
            hidden_states=rows.to(device, non_blocking=True),
            topk_ids=ids.view(torch.int32).view(head.rows, -1).to(torch.int64),  # stay here: the shard looks at them
            topk_weights=weights.view(torch.float32).view(head.rows, -1).to(device, non_blocking=True),
        )


@dataclass(slots=True, eq=False)
class _Peer:
    """One caller's connection. header: None while the next frame's head is being read.
    region: the memory that he shares.  features: of his version.
    fds: file descriptors that came with his words, not yet used."""

    sock: socket.socket
    nonce: bytes
    deadline: float | None
    target: memoryview
    filled: int = 0
    header: Header | None = None
    buffer: Tensor | None = None
    num_pending: int = 0
    outgoing: deque[memoryview] = field(default_factory=deque)
    region: Region | None = None
    features: int = 0
    fds: list[int] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Whether there is a request of his, or a part of one."""
        return self.num_pending > 0 or self.filled > 0 or (self.header is not None and self.header.kind is Kind.REQUEST)

    def receive(self) -> int:
        """Reads on in the target; returns the bytes. Before a region is shared, descriptors may come with them.

        Raises BlockingIOError, OSError.
        """
        target = self.target[self.filled :]
        if self.region is not None or self.sock.family != socket.AF_UNIX:
            return self.sock.recv_into(target)
        count, ancillary, _, _ = self.sock.recvmsg_into([target], _ANCILLARY_BYTES)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.fds += fds
        return count

    def close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


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
        self._max_group_rows = max_group_rows
        self._beat_s = beat_s
        self._turn = threading.Lock()  # of the thread that uses what follows; nobody holds it during a product
        self._selector = selectors.DefaultSelector()
        self._peers: set[_Peer] = set()
        self._waiting: deque[_Request] = deque()
        self._buffers = ReceiveBuffers(backend.device.type == "cuda")
        self._staging = Staging()
        tcp = socket.create_server((host, 0), backlog=64)
        listeners, unix_name = [tcp], ""
        if sys.platform == "linux":
            unix_name = f"moe-cluster-{os.getpid()}-{secrets.token_hex(8)}"
            unix = socket.socket(socket.AF_UNIX)
            unix.bind(f"\0{unix_name}")  # abstract: nothing is left on disk, whatever kills the process
            unix.listen(64)
            listeners.append(unix)
        self._listeners = listeners
        self._secret = secrets.token_bytes(32)
        self.offer = StreamOffer(unix_name, host, tcp.getsockname()[1], node, self._secret)
        self._wake_reader, self._wake_writer = socket.socketpair()
        for sock in (*listeners, self._wake_reader):
            sock.setblocking(False)
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
                self._read_and_write(0.0 if self._waiting else self._patience())
                if self._waiting:
                    self._compute(self._next_group())

    def _stand_in(self) -> None:
        """The deputy's work."""
        progress = self._pulse.progress()
        while not self._closed.wait(self._beat_s):
            if not self._turn.acquire(timeout=self._beat_s):
                continue  # nothing is computed
            try:
                if not self._closing:
                    self._read_and_write(0.0)
                    before, progress = progress, self._pulse.progress()
                    if progress != before:
                        self._beat()
            finally:
                self._turn.release()

    def _beat(self) -> None:
        """Tells all whose requests wait that the work goes on. Who does not read what he was sent is told nothing."""
        head, now = Header(kind=Kind.ALIVE, request_id=0, payload_bytes=0).pack(), time.monotonic()
        for peer in [p for p in self._peers if p.features & frames.FEATURES and p.waits and not p.outgoing]:
            try:
                self._send(peer, head)
            except OSError as error:
                log.info("a caller's connection ended: %s", error)
                self._drop(peer)
            for request in self._waiting:
                if request.peer is peer:
                    request.heard_at = now

    def _read_and_write(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                if key.fileobj is self._wake_reader:
                    self._wake_reader.recv(64)
                else:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                continue
            peer: _Peer = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    self._write(peer)
                if events & selectors.EVENT_READ:
                    self._read(peer)
            except ProtocolError as error:
                log.warning("a connection is closed: %s", error)
                self._refuse(peer, str(error))
            except OSError as error:
                log.info("a caller's connection ended: %s", error)
                self._drop(peer)
        if self._cut:
            self._cut = False
            for peer in list(self._peers):
                self._drop(peer)
        now = time.monotonic()
        for peer in [p for p in self._peers if p.deadline is not None and p.deadline <= now]:
            log.warning("a connection is closed: no handshake in %.0f s", HANDSHAKE_S)
            self._drop(peer)

    def _patience(self) -> float | None:
        """Seconds until the next stranger's time is up; None when there is none."""
        deadlines = [peer.deadline for peer in self._peers if peer.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # the stranger has gone again, or this process has too many files open
            log.warning("a connection could not be taken: %s", error)
            return
        if sock.family == socket.AF_UNIX and _user_of(sock) != os.getuid():
            log.warning("a connection of another user of this machine (uid %d) is closed", _user_of(sock))
            sock.close()
            return
        sock.setblocking(False)
        prepare_socket(sock)
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        peer = _Peer(sock, nonce, time.monotonic() + HANDSHAKE_S, memoryview(bytearray(frames.HELLO.size)))
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        self._send(peer, frames.GREETING.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, nonce))

    def _read(self, peer: _Peer) -> None:
        """Takes in what has arrived. Raises ProtocolError, OSError."""
        while peer.num_pending < MAX_PENDING:
            try:
                count = peer.receive()
            except BlockingIOError:
                return
            if not count:
                raise ConnectionResetError("the caller has closed it")
            peer.filled += count
            if peer.filled == len(peer.target):
                self._advance(peer)
        self._watch(peer)

    def _advance(self, peer: _Peer) -> None:
        """What was being read is whole: a handshake, a head or a payload."""
        peer.filled = 0
        if peer.deadline is not None:
            self._greet(peer)
            peer.deadline = None
        elif peer.header is None:
            head = Header.unpack(peer.target)
            if head.kind not in (Kind.REQUEST, Kind.SHARE):
                raise ProtocolError(f"a caller sent a frame of kind {head.kind.name}")
            if head.kind is Kind.SHARE and not 0 < head.payload_bytes <= MAX_DESCRIPTOR_BYTES:
                raise ProtocolError(f"a description of shared memory of {head.payload_bytes} bytes")
            if head.slot and peer.region is None:
                raise ProtocolError(f"a request in slot {head.slot} of memory that was not shared")
            peer.header, peer.buffer = head, self._buffers.take(head.payload_bytes)
            peer.target = frames.memory(peer.buffer)[: head.payload_bytes]
            return
        elif peer.header.kind is Kind.SHARE:
            peer.header.check(peer.target)
            self._share(peer)
        else:
            assert peer.buffer is not None
            peer.header.check(peer.target)
            timeout_s = peer.header.timeout_ms / 1000 if peer.header.timeout_ms != NO_TIMEOUT else float("inf")
            self._beat_s = max(MIN_BEAT_S, min(self._beat_s, timeout_s / 4))
            self._waiting.append(_Request(peer, peer.header, peer.buffer, timeout_s, time.monotonic()))
            peer.num_pending += 1
            peer.header = peer.buffer = None
        peer.target = memoryview(bytearray(HEADER.size))

    def _greet(self, peer: _Peer) -> None:
        magic, version, features, nonce, proof = frames.HELLO.unpack(peer.target)
        frames.check_version(magic, version)
        if not compare_digest(proof, frames.mac(self._secret, b"client", peer.nonce)):
            raise ProtocolError("the caller does not know this shard's secret")
        peer.features = features
        self._send(peer, frames.WELCOME.pack(frames.MAGIC, frames.VERSION, frames.mac(self._secret, b"server", nonce)))

    def _share(self, peer: _Peer) -> None:
        """Opens the caller's memory and says whether it could. Raises ProtocolError for a second time."""
        assert peer.header is not None
        assert peer.buffer is not None
        if peer.region is not None:
            raise ProtocolError("a caller shared memory twice")
        kind, message = Kind.ANSWER, b""
        try:
            descriptor = bytes(frames.memory(peer.buffer)[: peer.header.payload_bytes])
            peer.region = open_region(descriptor, peer.fds, self._backend.device)
        except ProtocolError as error:
            kind, message = Kind.FAILED, str(error).encode()
        peer.close_fds()
        request_id = peer.header.request_id
        self._buffers.give(peer.buffer)
        peer.header = peer.buffer = None
        self._send(peer, Header(kind=kind, request_id=request_id, payload_bytes=len(message)).pack(message), message)

    def _next_group(self) -> list[_Request]:
        """The oldest request and all others of its layer and dtype that are here, as far as they fit."""
        first = self._waiting[0].header
        group: list[_Request] = []
        others: deque[_Request] = deque()
        rows = 0
        for request in self._waiting:
            head = request.header
            same = (head.layer_id, head.dtype, head.hidden_size, head.topk) == (
                first.layer_id, first.dtype, first.hidden_size, first.topk)  # fmt: skip
            if same and (not group or rows + head.rows <= self._max_group_rows):
                group.append(request)
                rows += head.rows
            else:
                others.append(request)
        self._waiting = others
        return group

    def _compute(self, group: Sequence[_Request]) -> None:
        now = time.monotonic()
        for request in [r for r in group if now - r.heard_at >= r.timeout_s]:
            self._answer(request, Kind.UNAVAILABLE, b"the caller's time was over before its rows' turn came")
        group = [r for r in group if now - r.heard_at < r.timeout_s]
        if not group:
            return
        waited_s = max(0.0, time.time() - min(r.header.sent_at for r in group))  # hosts' clocks may differ
        try:
            batches = [request.batch(self._backend.device) for request in group]
            batch = batches[0] if len(batches) == 1 else _together(batches)
            out = self._work(lambda: self._backend.forward(batch, waited_s))
        except ShardUnavailable as error:
            self._end(group, Kind.UNAVAILABLE, str(error))
        except Exception as error:
            if not isinstance(error, ClusterError):
                log.exception("layer %d failed", group[0].header.layer_id)
            self._end(group, Kind.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._hand_back(group, out)

    def _work(self, work: Callable[[], T]) -> T:
        """Does what may take long; everything else is left to the deputy meanwhile."""
        self._turn.release()
        self._pulse.begin(on_cpu=self._on_cpu)
        try:
            return work()
        finally:
            self._pulse.end()
            self._turn.acquire()

    def _hand_back(self, group: Sequence[_Request], out: Tensor) -> None:
        """Each caller's part of a product [T, H]: into his memory, or through pinned memory and his socket."""
        parts: Sequence[Tensor] = out.split([r.header.rows for r in group])  # type: ignore[no-untyped-call]
        staged: list[tuple[Tensor, Tensor | None] | None] = []
        for request, part in zip(group, parts, strict=True):
            head = request.header
            if head.slot:
                assert request.peer.region is not None
                request.peer.region.rows(head.slot, head.rows, head.hidden_size, head.dtype).copy_(part)
                staged.append(None)
            else:
                staged.append(self._staging.copy(part))
        if out.is_cuda:
            self._work(torch.cuda.current_stream(out.device).synchronize)  # who gets the frame may read
        for request, own in zip(group, staged, strict=True):
            if own is None:
                self._answer(request, Kind.ANSWER, b"")
                continue
            self._answer(request, Kind.ANSWER, frames.memory(own[0]))
            if not request.peer.outgoing:
                self._staging.give_back(own[1])

    def _end(self, group: Sequence[_Request], kind: Kind, message: str) -> None:
        """One caller's wrong ids must not fail the others' rows: a group that fails is computed one by one."""
        if len(group) == 1:
            self._answer(group[0], kind, message.encode())
            return
        for request in group:
            self._compute([request])

    def _answer(self, request: _Request, kind: Kind, payload: bytes | memoryview) -> None:
        peer, head = request.peer, request.header
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
        try:
            self._send(peer, packed, payload)
            self._watch(peer)
        except OSError as error:
            log.info("a caller's connection ended: %s", error)
            self._drop(peer)

    def _send(self, peer: _Peer, *parts: bytes | memoryview) -> None:
        """Never waits: what the socket does not take now goes when it can. Raises OSError."""
        if not peer.outgoing:
            try:
                sent = peer.sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            rest = remaining(parts, sent)
        else:
            rest = [memoryview(part) for part in parts]
        if rest:
            peer.outgoing.extend(rest)
            self._watch(peer)

    def _write(self, peer: _Peer) -> None:
        while peer.outgoing:
            try:
                sent = peer.sock.sendmsg(peer.outgoing)
            except BlockingIOError:
                return
            peer.outgoing = deque(remaining(tuple(peer.outgoing), sent))
        self._watch(peer)

    def _watch(self, peer: _Peer) -> None:
        """Reads while there is room for requests, writes while there is something to write."""
        events = selectors.EVENT_READ if peer.num_pending < MAX_PENDING else 0
        events |= selectors.EVENT_WRITE if peer.outgoing else 0
        known = self._selector.get_map().get(peer.sock)
        if known is None:
            if events:
                self._selector.register(peer.sock, events, peer)
        elif not events:
            self._selector.unregister(peer.sock)
        elif known.events != events:
            self._selector.modify(peer.sock, events, peer)

    def _refuse(self, peer: _Peer, message: str) -> None:
        """Says why to who has proven himself, as far as the socket takes it at once, and ends the connection."""
        payload = message.encode()
        with suppress(OSError):  # it is being closed anyway
            if peer.deadline is None:
                head = Header(kind=Kind.REFUSED, request_id=0, payload_bytes=len(payload))
                peer.sock.sendmsg([head.pack(payload), payload])
        self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._peers.discard(peer)
        if peer.sock in self._selector.get_map():
            self._selector.unregister(peer.sock)
        peer.sock.close()
        peer.close_fds()
        if peer.buffer is not None:
            self._buffers.give(peer.buffer)
            peer.buffer = None
        for request in [r for r in self._waiting if r.peer is peer]:
            self._waiting.remove(request)
            self._buffers.give(request.buffer)


def prepare_socket(sock: socket.socket, user_timeout_ms: int = 10_000) -> None:
    """Large buffers; over TCP no delays, and an end to a peer that acknowledges nothing for user_timeout_ms."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)


def _user_of(sock: socket.socket) -> int:
    """Who connected, as the kernel says: a name without a file has no mode."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def remaining(parts: Sequence[bytes | memoryview], sent: int) -> list[memoryview]:
    """What is left of the parts after their first `sent` bytes."""
    rest = []
    for part in parts:
        size = len(part)
        if sent < size:
            rest.append(memoryview(part)[sent:])
        sent = max(0, sent - size)
    return rest


def _together(batches: Sequence[ExpertBatch]) -> ExpertBatch:
    return ExpertBatch(
        layer_id=batches[0].layer_id,
        epoch=max(batch.epoch for batch in batches),
        hidden_states=torch.cat([batch.hidden_states for batch in batches]),
        topk_ids=torch.cat([batch.topk_ids for batch in batches]),
        topk_weights=torch.cat([batch.topk_weights for batch in batches]),
    )
