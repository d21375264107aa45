"""Where a server leaves how to reach it and its Ray, for other commands of the same user."""

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
    """One that runs here. environment: what a process needs to be let in, such as a token."""

    ray_address: str
    grpc_address: str
    model: str
    environment: Mapping[str, str] = field(repr=False)
    started_at: float = field(default_factory=time.time)


def announce(server: Server, folder: Path) -> None:
    """Writes it down in its folder, readable by this user only; it goes with the folder."""
    written = folder / f"{FILE}.{os.getpid()}"
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(asdict(server), out)
    written.replace(folder / FILE)


def servers() -> list[Server]:
    """Those of this user that live, the newest first."""
    found = []
    with suppress(SetupError, OSError):  # where no folder can be made, none runs
        for folder in locked():
            with suppress(OSError, ValueError, TypeError):  # it is starting or ending, or of another version
                found.append(Server(**json.loads((folder / FILE).read_text())))
    return sorted(found, key=lambda server: server.started_at, reverse=True)


def find_address(asked: str | None = None) -> str | None:
    """The Ray address that is asked for, else that of the server that runs here; None for none.

    Sets the environment that its Ray wants, where one of ours is meant: call it before ray loads. Raises SetupError
    where several run: a command that changes a cluster must not guess which.
    """
    known = [server for server in servers() if not asked or asked == server.ray_address]
    if len(known) > 1 and len({server.ray_address for server in known}) > 1:
        choice = ", ".join(f"{s.ray_address} (gRPC {s.grpc_address}, {s.model})" for s in known)
        raise SetupError(f"{len(known)} servers run here: choose one with --ray-address: {choice}")
    if not known:
        return asked
    os.environ.update(known[0].environment)
    return known[0].ray_address
