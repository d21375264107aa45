"""A file in which a server writes its addresses, for other commands of the same user."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.errors import SetupError
from cluster.footprint.folders import locked

FILE = "server.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that runs here. environment: what a process needs to connect, such as a token."""

    ray_address: str
    grpc_address: str
    model: str
    environment: Mapping[str, str] = field(repr=False)
    started_at: float = field(default_factory=time.time)


def announce(server: Server, folder: Path) -> None:
    """Writes the server into its folder, readable by this user only; the file goes with the folder."""
    written = folder / f"{FILE}.{os.getpid()}"
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(asdict(server), out)
    written.replace(folder / FILE)


def servers() -> list[Server]:
    """This user's running servers, the newest first."""
    found = []
    with suppress(SetupError, OSError):  # where no folder can be made, none runs
        for folder in locked():
            with suppress(OSError, ValueError, TypeError):  # it is starting or ending, or of another version
                found.append(Server(**json.loads((folder / FILE).read_text())))
    return sorted(found, key=lambda server: server.started_at, reverse=True)


def find_address(asked: str | None = None) -> str | None:
    """The given Ray address, else that of the server that runs here; None for none.

    For a server of ours, sets the environment that its Ray needs: call it before you import ray. Raises SetupError
    where several run: a command that changes a cluster must not guess.
    """
    known = [server for server in servers() if not asked or asked == server.ray_address]
    if len(known) > 1 and len({server.ray_address for server in known}) > 1:
        choice = ", ".join(f"{s.ray_address} (gRPC {s.grpc_address}, {s.model})" for s in known)
        raise SetupError(f"{len(known)} servers run here: choose one with --ray-address: {choice}")
    if not known:
        return asked
    os.environ.update(known[0].environment)
    return known[0].ray_address
