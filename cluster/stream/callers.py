"""The callers of a shard's stream: who is connected, whose bytes have come, whose are still to go. Computes nothing.

All methods but `wake` belong to the thread that has the server's turn, and none of them waits for a caller.
"""

import logging
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from cluster.errors import ProtocolError
from cluster.logs import SeldomLog
from cluster.stream.buffers import ReceiveBuffers
from cluster.stream.frames import StreamOffer
from cluster.stream.groups import WaitingRequests
from cluster.stream.peer import HANDSHAKE_S, Peer, Request, State
from cluster.stream.sockets import listen, user_of

log = logging.getLogger(__name__)
seldom = SeldomLog(log)


class Callers:
    """Listens on a Unix socket (Linux) and on TCP until `close`. Whole requests go to `waiting`.

    on_request: called for each of them.
    """

    def __init__(
        self,
        host: str,
        node: str,
        device: torch.device,
        waiting: WaitingRequests,
        *,
        on_request: Callable[[Request], None],
    ) -> None:
        self.waiting = waiting
        self.peers: set[Peer] = set()
        self._on_request = on_request
        self._device = device
        self._selector = selectors.DefaultSelector()
        self._buffers = ReceiveBuffers(device.type == "cuda")
        self._listeners, unix_name = listen(host)
        self._secret = secrets.token_bytes(32)
        self.offer = StreamOffer(unix_name, host, self._listeners[0].getsockname()[1], node, self._secret)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        for sock in (*self._listeners, self._wake_reader):
            self._selector.register(sock, selectors.EVENT_READ)

    def close(self) -> None:
        self.drop_all()
        for sock in (*self._listeners, self._wake_reader, self._wake_writer):
            sock.close()
        self._selector.close()

    def wake(self) -> None:
        """Ends a `read_and_write` that waits. Any thread may call it."""
        self._wake_writer.send(b"x")

    def fileno(self) -> int:
        """Can be read when `read_and_write` has something to do."""
        return self._selector.fileno()

    def read_and_write(self, timeout_s: float | None) -> None:
        """Waits for something to do, until the next stranger's time is up at the latest, and does it."""
        for key, events in self._selector.select(self._next_deadline_s() if timeout_s is None else timeout_s):
            if key.data is not None:
                self.attend_to(key.data, events)
            elif key.fileobj is self._wake_reader:
                self._wake_reader.recv(64)
            else:
                self._accept(key.fileobj)  # type: ignore[arg-type]
        now = time.monotonic()
        for peer in [p for p in self.peers if p.state is State.HELLO and p.deadline <= now]:
            seldom.warning("a connection is closed: no handshake in %.0f s", HANDSHAKE_S)
            self.drop(peer)

    def attend_to(self, peer: Peer, events: int) -> None:
        """Writes and reads what the socket allows now."""
        try:
            if events & selectors.EVENT_WRITE:
                peer.write()
            if events & selectors.EVENT_READ:
                for request in peer.read():
                    self.waiting.add(request)
                    self._on_request(request)
            self._watch(peer)
        except ProtocolError as error:
            report = seldom if peer.state is State.HELLO else log  # of a process of ours there are few
            report.warning("a connection is closed: %s", error)
            peer.refuse(str(error))
            self.drop(peer)
        except OSError as error:
            log.info("a caller's connection ended: %s", error)
            self.drop(peer)

    def send(self, peer: Peer, *parts: bytes | memoryview) -> None:
        """Never waits: bytes that the socket does not take now go when it takes them."""
        try:
            peer.send(*parts)
            self._watch(peer)
        except OSError as error:
            log.info("a caller's connection ended: %s", error)
            self.drop(peer)

    def drop(self, peer: Peer) -> None:
        if peer.lent:  # the native loop waits at its socket, whose number must stay: it comes back and ends it
            with suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
            return
        self.peers.discard(peer)
        if peer.watched:
            self._selector.unregister(peer.sock)
            peer.watched = 0
        peer.close()
        for request in self.waiting.drop(peer):
            self._buffers.give(request.buffer)

    def drop_all(self) -> None:
        for peer in list(self.peers):
            self.drop(peer)

    def give_back(self, request: Request) -> bool:
        """The request is answered; whether its caller is still here."""
        self._buffers.give(request.buffer)
        request.peer.num_pending -= 1
        return request.peer in self.peers

    def lend(self, peer: Peer, lent: bool) -> None:
        """Another reads from his socket, or no longer."""
        peer.lent = lent
        if peer in self.peers:
            self._watch(peer)

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

    def _next_deadline_s(self) -> float | None:
        """Seconds until the next stranger's time is up; None when there is none."""
        deadlines = [peer.deadline for peer in self.peers if peer.state is State.HELLO]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
            if sock.family == socket.AF_UNIX and (user := user_of(sock)) != os.getuid():
                seldom.warning("a connection of another user of this machine (uid %d) is closed", user)
                sock.close()
                return
            peer = Peer(sock, self._secret, self._buffers, self._device)
        except OSError as error:  # the stranger has gone again, or this process has too many files open
            seldom.warning("a connection could not be taken: %s", error)
            return
        self.peers.add(peer)
        self.send(peer, peer.greeting())
