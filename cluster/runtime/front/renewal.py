"""Certificates for HAProxy, and renewed ones for one that runs: a thread beside it looks at the operator's files."""

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
    """What HAProxy reads, made of the operator's files. kind: HAProxy's word for it, "cert" or "ca-file"."""

    path: Path
    kind: str
    sources: Sequence[str]

    def wanted(self) -> bytes:
        """The PEM blocks of the sources, one after the other, and nothing else: neither comments nor empty lines, which
        would end a command of HAProxy's.

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
        """For this user only; whole at once, so that a HAProxy that starts meanwhile reads the old one or the new.

        Raises OSError, ssl.SSLError among them, or ValueError for what cannot serve; the old one then stays.
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
    """For a key that has one. Raises ValueError."""
    raise ValueError("the key has a password, which nobody is there to type")


def prepare(copies: Sequence[Copy]) -> dict[Path, bytes]:
    """Writes what a HAProxy that starts now reads; returns it. Half of a renewal leaves what was there.

    Raises OSError, ValueError where nothing was.
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
    """This process, whatever program it becomes, gets SIGTERM when who started it ends; it ends here if that was
    before."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def watch(copies: Sequence[Copy], read: Mapping[Path, bytes], admin_socket: Path, haproxy: Callable[[], int]) -> None:
    """Never returns, but where there is nothing to watch.

    read: what HAProxy has read of each copy.  haproxy: its pid; 0 for one that has a successor, and only drains.
    """
    if not copies:
        return
    told, complaints = dict(read), dict[Path, str]()
    while True:
        time.sleep(INTERVAL_S)
        for copy in copies:
            complaint = ""
            try:
                wanted = copy.wanted()
                if wanted == told[copy.path] == copy.path.read_bytes() or not _is_at(admin_socket, haproxy()):
                    continue
                if wanted != told[copy.path]:
                    tell(copy, wanted, admin_socket)
                    told[copy.path] = wanted
                copy.write(wanted)
            except (OSError, ValueError) as error:  # half of a renewal: the next look sees the rest
                complaint = str(error)
                if complaint != complaints.get(copy.path):
                    _say(copy, error)
            finally:
                complaints[copy.path] = complaint


def tell(copy: Copy, data: bytes, admin_socket: Path) -> None:
    """Gives HAProxy what it then serves new connections with. Raises OSError; ValueError for what it does not take."""
    parts = [data]
    if copy.kind == "ca-file":  # a command has 16 KB at most: one certificate at a time
        parts = [block + b"\n" for block in PEM_BLOCK.findall(data)]
    commands = [
        f"{'add' if n else 'set'} ssl {copy.kind} {copy.path} <<\n{part.decode('ascii')}\n"
        for n, part in enumerate(parts)
    ]
    said = ""
    for command in (*commands, f"commit ssl {copy.kind} {copy.path}\n"):
        said = ask(command, admin_socket)
        if not re.search(r"transaction (created|updated)|success", said, flags=re.IGNORECASE):
            ask(f"abort ssl {copy.kind} {copy.path}\n", admin_socket)
            raise ValueError(" ".join(said.split()))


def _is_at(admin_socket: Path, pid: int) -> bool:
    """Whether the socket is this HAProxy's: another one has read the files anew."""
    return f"\nPid: {pid}\n" in ask("show info\n", admin_socket)


def ask(command: str, admin_socket: Path) -> str:
    """Raises OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(admin_socket))
        sock.sendall(command.encode())
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(4096), b"")).decode(errors="replace")


def _say(copy: Copy, error: Exception) -> None:
    sys.stderr.write(f"moe-cluster: {copy.path.name} stays as it was, {', '.join(copy.sources)}: {error}\n")
    sys.stderr.flush()
