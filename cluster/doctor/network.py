"""Looks at what runs on this machine already: servers of this user, the ports that a new one takes, its Ray."""

import os
import resource
import socket
from collections.abc import Iterator, Mapping

from cluster.config import DEFAULTS
from cluster.doctor.finding import Finding
from cluster.footprint.servers import Server, servers

PORTS = {
    "--grpc-port": (9000, "gRPC"),
    "--http-port": (8000, "HTTP"),
    "--metrics-port": (DEFAULTS["metrics_port"], "metrics"),
}
MIN_FILES = 1024  # a Ray process has some hundred of connections and logs open, HAProxy two for a stream


def examine_network(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    running = servers()
    for server in running:
        yield Finding("server", f"{server.model} runs here: gRPC {server.grpc_address}, Ray {server.ray_address}")
    yield from _ports(running)
    yield from _ray_address(environment)
    yield from _open_files()


def _ports(running: list[Server]) -> Iterator[Finding]:
    ours = {server.grpc_address.rpartition(":")[2] for server in running}
    free = []
    for option, (port, use) in PORTS.items():
        reason = taken(port)
        if not reason:
            free.append(f"{port} ({use})")
        elif str(port) in ours:
            yield Finding(f"port {port}", f"{use}: of a server above")
        else:
            yield Finding(f"port {port}", f"{use}: {reason}", f"`moe-cluster serve {option} 0` takes a free one")
    if free:
        yield Finding("ports", f"{', '.join(free)}: free")


def taken(port: int) -> str:
    """Why a server cannot listen at a port of this machine; "" where it can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _ray_address(environment: Mapping[str, str]) -> Iterator[Finding]:
    address = environment.get("RAY_ADDRESS")
    if address:
        advice = "" if _answers(address) else f"no Ray answers there: `ray start`, or unset RAY_ADDRESS={address}"
        yield Finding("Ray's address", f"RAY_ADDRESS={address}: commands use that Ray, and start none", advice)


def _answers(address: str) -> bool:
    """Whether something listens; an address that is no HOST:PORT is Ray's to read."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, OverflowError):
        return False
    return True


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        most = "" if hard == resource.RLIM_INFINITY else f", up to {hard}"
        advice = f"many streams need more: `ulimit -n 65536` in the shell that starts a server{most}"
        yield Finding("open files", f"{soft} for each process", advice)
