"""Makes and prepares the sockets of both ends of a stream. Knows no frames."""

import os
import secrets
import select
import socket
import struct
import sys
from collections.abc import Sequence

SOCKET_BUFFER_BYTES = 1 << 22  # a prefill chunk goes in few writes


def listen(host: str) -> tuple[list[socket.socket], str]:
    """Listening sockets, on TCP at a free port of `host` first, then on Linux a Unix socket, whose abstract name is
    returned too, else "". They do not block. Raises OSError."""
    listeners, unix_name = [socket.create_server((host, 0), backlog=64)], ""
    if sys.platform == "linux":
        unix_name = f"moe-cluster-{os.getpid()}-{secrets.token_hex(8)}"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(f"\0{unix_name}")  # abstract: nothing is left on disk, however the process ends
        unix.listen(64)
        listeners.append(unix)
    for listener in listeners:
        listener.setblocking(False)
    return listeners, unix_name


def prepare_socket(sock: socket.socket, user_timeout_ms: int = 10_000) -> None:
    """Large buffers; over TCP no delays, and an end to a peer that acknowledges nothing for user_timeout_ms."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)


def user_of(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket, from the kernel: an abstract name has no file mode."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def remaining(parts: Sequence[bytes | memoryview], sent: int) -> list[memoryview]:
    """The rest of the parts after their first `sent` bytes."""
    rest = []
    for part in parts:
        size = len(part)
        if sent < size:
            rest.append(memoryview(part)[sent:])
        sent = max(0, sent - size)
    return rest


def has_room(sock: socket.socket) -> bool:
    """Whether some hundred bytes can be sent now without waiting for the other side to read."""
    room = select.poll()
    room.register(sock, select.POLLOUT)
    return bool(room.poll(0))
