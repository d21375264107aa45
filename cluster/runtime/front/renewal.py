"""Gives HAProxy its certificates, and renewed ones while it runs: a thread watches the operator's files."""

import ctypes
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
PEM_BLOCK = re.compile(rb"-----BEGIN [^\n]*?-----.*?-----END [^\n]*?-----", re.DOTALL)
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent's thread ends


@dataclass(frozen=True, slots=True)
class Copy:
    """A file for HAProxy, made of the operator's files. kind: HAProxy's word for it, "cert" or "ca-file"."""

    path: Path
    kind: str
    sources: Sequence[str]

    def wanted(self) -> bytes:
        """The PEM blocks of the sources, one after the other, without comments and empty lines, which would end a
        command of HAProxy's.

        Raises OSError; ValueError for a source without any.
        """
        blocks: list[bytes] = []
        for source in self.sources:
            found = PEM_BLOCK.findall(Path(source).read_bytes())
            if not found:
                raise ValueError(f"{source} has no PEM block")
            blocks += (b"\n".join(filter(None, map(bytes.strip, block.splitlines()))) for block in found)
        return b"\n".join(blocks) + b"\n"

    def write(self, data: bytes) -> None:
        """Replaces the file, for this user only and at once: an HAProxy that starts meanwhile reads the old or the new.

        Raises OSError, ssl.SSLError among them, or ValueError for data that cannot serve; then the old file stays.
        """
        made = self.path.with_suffix(f".{os.getpid()}")
        made.unlink(missing_ok=True)
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.kind == "cert":
                context.load_cert_chain(made, password=no_password)
            else:
                context.load_verify_locations(made)
        except (OSError, ValueError):
            made.unlink()
            raise
        made.replace(self.path)


def no_password() -> str:
    """Refuses a key with a password. Raises ValueError."""
    raise ValueError("the key has a password, which nobody is there to type")


def prepare(copies: Sequence[Copy]) -> dict[Path, bytes]:
    """Writes the files for an HAProxy that starts now; returns them. Keeps the old file where a renewal is incomplete.

    Raises OSError, ValueError where there is no old file.
    """
    for copy in copies:
        try:
            copy.write(copy.wanted())
        except (OSError, ValueError) as error:
            if not copy.path.exists():
                raise
            _say(copy, error)
    return {copy.path: copy.path.read_bytes() for copy in copies}


def end_with_parent(parent: int) -> None:
    """Makes SIGTERM reach this process, whatever program it becomes, when its parent ends; exits if the parent is gone
    already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def watch(copies: Sequence[Copy], read: Mapping[Path, bytes], admin_socket: Path, haproxy: Callable[[], int]) -> None:
    """Gives HAProxy each renewed file. Returns only where there is nothing to watch.

    read: each copy as HAProxy has read it.  haproxy: its pid; 0 for one that has a successor, and only drains.
    """
    if not copies:
        return
    known, complaints = dict(read), dict[Path, str]()
    while True:
        time.sleep(INTERVAL_S)
        for copy in copies:
            complaint = ""
            try:
                wanted = copy.wanted()
                if wanted == known[copy.path] == copy.path.read_bytes() or not _is_at(admin_socket, haproxy()):
                    continue
                if wanted != known[copy.path]:
                    tell(copy, wanted, admin_socket)
                    known[copy.path] = wanted
                copy.write(wanted)
            except (OSError, ValueError) as error:  # half of a renewal: the next look sees the rest
                complaint = str(error)
                if complaint != complaints.get(copy.path):
                    _say(copy, error)
            finally:
                complaints[copy.path] = complaint


def tell(copy: Copy, data: bytes, admin_socket: Path) -> None:
    """Makes HAProxy use the data for new connections. Raises OSError; ValueError where HAProxy refuses the data."""
    parts = [data]
    if copy.kind == "ca-file":  # a command has 16 KB at most: one certificate at a time
        parts = [block + b"\n" for block in PEM_BLOCK.findall(data)]
    commands = [
        f"{'add' if n else 'set'} ssl {copy.kind} {copy.path} <<\n{part.decode('ascii')}\n"
        for n, part in enumerate(parts)
    ]
    answer = ""
    for command in (*commands, f"commit ssl {copy.kind} {copy.path}\n"):
        answer = ask(command, admin_socket)
        if not re.search(r"transaction (created|updated)|success", answer, flags=re.IGNORECASE):
            ask(f"abort ssl {copy.kind} {copy.path}\n", admin_socket)
            raise ValueError(" ".join(answer.split()))


def _is_at(admin_socket: Path, pid: int) -> bool:
    """Whether the socket belongs to this HAProxy: another one has read the new files."""
    return f"\nPid: {pid}\n" in ask("show info\n", admin_socket)


def ask(command: str, admin_socket: Path) -> str:
    """HAProxy's answer to a command. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(admin_socket))
        sock.sendall(command.encode())
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(4096), b"")).decode(errors="replace")


def _say(copy: Copy, error: Exception) -> None:
    sys.stderr.write(f"moe-cluster: {copy.path.name} stays as it was, {', '.join(copy.sources)}: {error}\n")
    sys.stderr.flush()
