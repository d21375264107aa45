"""Listening sockets that outlive the process that accepts on them: a successor gets them through a Unix socket."""

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BACKLOG = 4096
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 16
MAX_LISTENERS = 64


@dataclass(frozen=True, slots=True)
class Handed:
    """The sockets that process `pid` gave, by address as HAProxy writes it. keeper: the process that keeps `pid`."""

    pid: int
    keeper: int
    listeners: Mapping[str, socket.socket]

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()


def open_listener(address: str, holders: Sequence[int] = ()) -> socket.socket:
    """address: "127.0.0.1:9000", "*:8000", ":8000" or "::1:9000".  holders: HAProxies that may still listen there;
    each gets SIGTTOU, at which it stops. Raises OSError."""
    host, _, port = address.rpartition(":")
    host = "0.0.0.0" if host in ("", "*") else host.strip("[]")
    family, kind, protocol, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:  # a killed process closes it soon
                raise OSError(error.errno, f"{address}: {error.strerror}") from error
            for pid in holders:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTTOU)
            time.sleep(0.05)
        else:
            return listener


def hand_over(server: socket.socket, listeners: Mapping[str, socket.socket], keeper: int) -> None:
    """Answers a process that has connected to `server`."""
    with suppress(OSError):  # it has gone again
        connection, _ = server.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            text = json.dumps({"pid": os.getpid(), "keeper": keeper, "addresses": list(listeners)}).encode()
            socket.send_fds(connection, [text], [listener.fileno() for listener in listeners.values()])


def ask_for(path: Path) -> Handed | None:
    """Gets the sockets of the process at this Unix socket; None where no process is."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(path))
            text, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, MAX_LISTENERS)
        if not text:
            return None
        answer = json.loads(text)
    except OSError:
        return None
    listeners = dict(zip(answer["addresses"], (socket.socket(fileno=fd) for fd in fds), strict=True))
    return Handed(answer["pid"], answer.get("keeper", answer["pid"]), listeners)  # an older version has no keeper


def serve_at(path: Path) -> socket.socket:
    """A Unix socket at this path; takes the path from the process that had it."""
    server, made = socket.socket(socket.AF_UNIX), path.with_name(f"{path.name}{os.getpid()}")
    made.unlink(missing_ok=True)
    server.bind(str(made))
    server.listen(16)
    made.replace(path)
    return server
