"""One caller's connection, as the shard sees it: it reads his frames part by part, and keeps the bytes not yet sent.

Knows no other caller, no queue and no selector. Never blocks on the socket.
"""

import array
import os
import secrets
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from hmac import compare_digest

import torch
from torch import Tensor

from cluster.errors import ProtocolError
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.buffers import ReceiveBuffers, memory
from cluster.stream.frames import HEADER, NO_TIMEOUT, Header, Kind
from cluster.stream.region import Region, open_region
from cluster.stream.sockets import prepare_socket, remaining

HANDSHAKE_S = 5.0  # for a stranger to prove himself
MAX_DESCRIPTOR_BYTES = 1 << 16  # of shared memory
MAX_TRACE_BYTES = 1 << 16  # 2,730 spans
MAX_PENDING = 8  # requests of one caller that wait here; then nothing more is read from him
_ANCILLARY_BYTES = socket.CMSG_SPACE(16)  # for a few file descriptors; the kernel closes those that find no room


class State(Enum):
    """The part that is being read. A stranger becomes a caller with his HELLO; from then on heads and payloads come in
    turn, until the connection ends."""

    HELLO = auto()
    HEAD = auto()
    SHARE = auto()  # the payload that describes shared memory
    TRACE = auto()  # the payload that names spans
    REQUEST = auto()  # the payload of a request


_MOST_BYTES = {Kind.SHARE: MAX_DESCRIPTOR_BYTES, Kind.TRACE: MAX_TRACE_BYTES}
_WITH_PAYLOAD = {Kind.REQUEST: State.REQUEST, Kind.SHARE: State.SHARE, Kind.TRACE: State.TRACE}


@dataclass(slots=True)
class Request:
    """A whole request, waiting for its turn.

    timeout_s: how long its caller waits without a word from here.
    heard_at: when he was last told that the work goes on, or when the request came.
    trace: the spans to which it belongs, packed; none where it is not traced.
    """

    peer: "Peer"
    head: Header
    buffer: Tensor
    timeout_s: float
    heard_at: float
    trace: bytes = b""

    def batch(self, device: torch.device) -> ExpertBatch:
        head = self.head
        ids_bytes = head.rows * head.topk * 4
        ids, weights = (self.buffer[i * ids_bytes : (i + 1) * ids_bytes] for i in range(2))
        if head.slot:
            rows = self.shared_rows()
        else:
            rows = self.buffer[2 * ids_bytes : head.payload_bytes].view(head.dtype).view(head.rows, -1)
        return ExpertBatch(
            layer_id=head.layer_id,
            epoch=head.epoch,
            hidden_states=rows.to(device, non_blocking=True),
            topk_ids=ids.view(torch.int32).view(head.rows, -1).to(torch.int64),  # stay here: the shard looks at them
            topk_weights=weights.view(torch.float32).view(head.rows, -1).to(device, non_blocking=True),
        )

    def shared_rows(self) -> Tensor:
        """[T, H] in the slot of the caller's memory that the head names."""
        assert self.peer.region is not None
        return self.peer.region.rows(self.head.slot, self.head.rows, self.head.hidden_size, self.head.dtype)


class Peer:
    """One caller's connection.

    state: the part that is being read.  deadline: for a stranger to prove himself.
    features: of his version.  region: the memory that he shares, if any.  num_pending: his requests that wait here.
    outgoing: bytes that the socket has not taken yet.  watched: the selector's events, which the server keeps.
    lent: the native loop reads from the socket (`steady.py`), nobody else.
    trace: the spans to which his next requests belong, packed; traced_at: when he said so, ns of the wall clock.
    """

    def __init__(self, sock: socket.socket, secret: bytes, buffers: ReceiveBuffers, device: torch.device) -> None:
        sock.setblocking(False)
        prepare_socket(sock)
        self.sock = sock
        self.state = State.HELLO
        self.deadline = time.monotonic() + HANDSHAKE_S
        self.features = 0
        self.region: Region | None = None
        self.num_pending = 0
        self.outgoing: deque[memoryview] = deque()
        self.watched = 0
        self.lent = False
        self.trace, self.traced_at = b"", 0
        self._ahead = b""  # read from the socket already
        self._secret = secret
        self._nonce = secrets.token_bytes(frames.NONCE_BYTES)
        self._buffers = buffers
        self._device = device
        self._target = memoryview(bytearray(frames.HELLO.size))
        self._filled = 0
        self._frame: tuple[Header, Tensor] | None = None  # in SHARE and REQUEST: the head, and memory for the payload
        self._fds: list[int] = []  # file descriptors that have come, not yet used

    @property
    def waits(self) -> bool:
        """Whether a request of his is here, or a part of one."""
        return self.num_pending > 0 or self._filled > 0 or self.state is State.REQUEST

    @property
    def is_idle(self) -> bool:
        """Whether a caller with shared memory has nothing under way in either direction."""
        begun = self._filled > 0 or self.state is not State.HEAD or bool(self._ahead)
        return self.region is not None and not (begun or self.num_pending or self.outgoing)

    @property
    def events(self) -> int:
        """The selector's events to watch for: reads while there is room for requests, writes while any are left."""
        if self.lent:
            return 0
        events = selectors.EVENT_READ if self.num_pending < MAX_PENDING else 0
        return events | (selectors.EVENT_WRITE if self.outgoing else 0)

    def greeting(self) -> bytes:
        """The first words on a connection."""
        return frames.GREETING.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, self._nonce)

    def read(self) -> Iterator[Request]:
        """Reads all bytes that have arrived, and yields the requests that are whole. Raises ProtocolError, OSError."""
        while self.num_pending < MAX_PENDING:
            try:
                count = self._receive()
            except BlockingIOError:
                return
            if not count:
                raise ConnectionResetError("the caller has closed it")
            self._filled += count
            if self._filled == len(self._target):
                request = self._advance()
                if request is not None:
                    yield request

    def unread(self, data: bytes) -> None:
        """Bytes that were read from the socket elsewhere come first in the next `read`."""
        self._ahead += data

    def send(self, *parts: bytes | memoryview) -> None:
        """Puts into `outgoing` the bytes that the socket does not take now. Raises OSError."""
        if self.outgoing:
            self.outgoing.extend(memoryview(part) for part in parts)
            return
        try:
            sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        self.outgoing.extend(remaining(parts, sent))

    def write(self) -> None:
        """Sends on from `outgoing`, as far as the socket takes it. Raises OSError."""
        while self.outgoing:
            try:
                sent = self.sock.sendmsg(self.outgoing)
            except BlockingIOError:
                return
            self.outgoing = deque(remaining(tuple(self.outgoing), sent))

    def refuse(self, message: str) -> None:
        """Tells a caller, but no stranger, why the connection ends, if the socket takes it at once."""
        if self.state is State.HELLO:
            return
        payload = message.encode()
        head = Header(kind=Kind.REFUSED, payload_bytes=len(payload))
        with suppress(OSError):  # it is being closed anyway
            self.sock.sendmsg([head.pack(payload), payload])

    def close(self) -> None:
        self.sock.close()
        self._close_fds()
        if self._frame is not None:
            self._buffers.give(self._frame[1])
            self._frame = None

    def _receive(self) -> int:
        """Reads on in the target; returns the number of bytes. Before a region is shared, descriptors may come too.

        Raises BlockingIOError, OSError.
        """
        target = self._target[self._filled :]
        if self._ahead:
            count = min(len(target), len(self._ahead))
            target[:count], self._ahead = self._ahead[:count], self._ahead[count:]
            return count
        if self.region is not None or self.sock.family != socket.AF_UNIX:
            return self.sock.recv_into(target)
        count, ancillary, _, _ = self.sock.recvmsg_into([target], _ANCILLARY_BYTES)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds += fds
        return count

    def _advance(self) -> Request | None:
        """Ends the part that is whole and begins the next; returns the request if the part was its last one."""
        self._filled = 0
        request = None
        if self.state is State.HEAD:
            head = Header.unpack(self._target)
            if head.kind is not Kind.TRACE or head.payload_bytes:
                self._begin_payload(head)
                return None
            head.check(memoryview(b""))
            self.trace = b""
        if self.state is State.HELLO:
            self._prove()
        elif self.state is State.SHARE:
            self._share()
        elif self.state is State.TRACE:
            self._taken()
            self.trace, self.traced_at = bytes(self._target), time.time_ns()
        elif self.state is State.REQUEST:
            request = self._end_request()
        self.state = State.HEAD
        self._target = memoryview(bytearray(HEADER.size))
        return request

    def _prove(self) -> None:
        """Raises ProtocolError for a stranger who does not know the secret."""
        magic, version, features, nonce, proof = frames.HELLO.unpack(self._target)
        frames.check_version(magic, version)
        if not compare_digest(proof, frames.mac(self._secret, b"client", self._nonce)):
            raise ProtocolError("the caller does not know this shard's secret")
        self.features = features
        self.send(frames.WELCOME.pack(frames.MAGIC, frames.VERSION, frames.mac(self._secret, b"server", nonce)))

    def _begin_payload(self, head: Header) -> None:
        if head.kind not in _WITH_PAYLOAD:
            raise ProtocolError(f"a caller sent a frame of kind {head.kind.name}")
        if head.kind is not Kind.REQUEST and not 0 < head.payload_bytes <= _MOST_BYTES[head.kind]:
            raise ProtocolError(f"a frame of kind {head.kind.name} with {head.payload_bytes} bytes")
        if head.slot and self.region is None:
            raise ProtocolError(f"a request in slot {head.slot} of memory that was not shared")
        buffer = self._buffers.take(head.payload_bytes)
        self._frame = head, buffer
        self._target = memory(buffer)[: head.payload_bytes]
        self.state = _WITH_PAYLOAD[head.kind]

    def _share(self) -> None:
        """Opens the caller's memory and answers whether it could. Raises ProtocolError for a second time."""
        head = self._taken()
        if self.region is not None:
            raise ProtocolError("a caller shared memory twice")
        kind, message = Kind.ANSWER, b""
        try:
            self.region = open_region(bytes(self._target), self._fds, self._device)
        except ProtocolError as error:
            kind, message = Kind.FAILED, str(error).encode()
        self._close_fds()
        answer = Header(kind=kind, request_id=head.request_id, payload_bytes=len(message))
        self.send(answer.pack(message), message)

    def _taken(self) -> Header:
        """The head of a frame whose payload is whole, and of which the target is read at once."""
        assert self._frame is not None
        (head, buffer), self._frame = self._frame, None
        self._buffers.give(buffer)
        head.check(self._target)
        return head

    def _end_request(self) -> Request:
        assert self._frame is not None
        head, buffer = self._frame
        head.check(self._target)
        self._frame = None
        self.num_pending += 1
        timeout_s = head.timeout_ms / 1000 if head.timeout_ms != NO_TIMEOUT else float("inf")
        return Request(self, head, buffer, timeout_s, time.monotonic(), self.trace)

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
