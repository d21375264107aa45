"""Renewed certificates, for a HAProxy that runs: a process beside it looks at the files, and tells it by its socket."""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent's thread ends


@dataclass(frozen=True, slots=True)
class Copy:
    """What HAProxy reads, made of the operator's files. kind: HAProxy's word for it, "cert" or "ca-file"."""

    path: Path
    kind: str
    sources: Sequence[str]

    def write(self) -> None:
        """For this user only; whole at once, so that a HAProxy that starts meanwhile reads the old one or the new.

        Raises OSError.
        """
        made = self.path.with_suffix(f".{os.getpid()}")
        made.unlink(missing_ok=True)
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(self.wanted())
        made.replace(self.path)

    def wanted(self) -> bytes:
        """The sources one after the other, without empty lines, which would end a command of HAProxy's."""
        lines = [line.strip() for source in self.sources for line in Path(source).read_bytes().splitlines()]
        return b"\n".join(filter(None, lines)) + b"\n"


def end_with_parent() -> None:
    """This process, whatever program it becomes, gets SIGTERM when who started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def watch_beside(copies: Sequence[Copy], admin_socket: Path) -> None:
    """Starts the process, which ends with this one; nothing where there is nothing to watch."""
    if not copies or os.fork():
        return
    end_with_parent()
    while True:
        time.sleep(INTERVAL_S)
        for copy in copies:
            try:
                renew(copy, admin_socket)
            except (OSError, ValueError) as error:  # half of a renewal, or HAProxy starts: the next look sees the rest
                sys.stderr.write(f"moe-cluster: {copy.path.name} is not renewed: {error}\n")


def renew(copy: Copy, admin_socket: Path) -> bool:
    """Tells HAProxy if the operator's files have changed. Raises OSError; ValueError for what HAProxy does not take."""
    wanted = copy.wanted()
    if wanted == copy.path.read_bytes():
        return False
    for command, answer in (
        (f"set ssl {copy.kind} {copy.path} <<\n{wanted.decode()}\n", "transaction created for"),
        (f"commit ssl {copy.kind} {copy.path}\n", "success!"),
    ):
        said = _ask(command, admin_socket)
        if answer not in said.lower():
            _ask(f"abort ssl {copy.kind} {copy.path}\n", admin_socket)
            raise ValueError(" ".join(said.split()))
    copy.write()
    return True


def _ask(command: str, admin_socket: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(admin_socket))
        sock.sendall(command.encode())
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(4096), b"")).decode(errors="replace")
