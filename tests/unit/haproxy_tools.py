"""Our program as HAProxy, with the configuration that Serve writes for one gRPC server behind it."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc
from ray.serve._private.common import RequestProtocol
from ray.serve._private.constants import HEALTHY_MESSAGE
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from cluster.runtime.front.haproxy import PROGRAM, SERVE_ENVIRONMENT
from cluster.runtime.front.renewal import ask
from cluster.runtime.front.tls import GrpcFront


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Healthz(serve_pb2_grpc.RayServeAPIServiceServicer):
    """Serve's answer to HAProxy's checks of an ingress; the list of applications is for nobody."""

    message = HEALTHY_MESSAGE

    def Healthz(self, request, context):
        if self.message != HEALTHY_MESSAGE:  # as Serve's ingresses do
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            context.set_details(self.message)
        return serve_pb2.HealthzResponse(message=self.message)

    def ListApplications(self, request, context):
        return serve_pb2.ListApplicationsResponse(application_names=["secret"])


@contextmanager
def ingress(servicer, port=0, healthz=None):
    """A gRPC server of this process with the health service; yields its port."""
    server = grpc.server(ThreadPoolExecutor(300))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    serve_pb2_grpc.add_RayServeAPIServiceServicer_to_server(healthz or Healthz(), server)
    try:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        yield bound
    finally:
        server.stop(None)


@contextmanager
def http_server(handler):
    """A server of HTTP in this process; yields its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def write_config(folder, ports, backend_ports, http=(), leaves=False):
    """Writes Serve's configuration for an application with an ingress at each port; without one for None.

    ports: HAProxy's four, those of gRPC and HTTP first.  http: the ingresses' ports of HTTP.  leaves: the node drains.
    """
    port, http_port, metrics, stats = ports
    path = folder / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=http_port),
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=["any"]),
        socket_path=str(folder / "a.sock"),
        metrics_socket_path=str(folder / "m.sock"),
        metrics_port=metrics,
        stats_port=stats,
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        is_head=True,
        bufsize=int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        h2_fe_max_concurrent_streams=int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS"]),
    )
    config.pass_health_checks = not leaves
    api = HAProxyApi(cfg=config, config_file_path=str(path))
    if backend_ports is not None:
        apps = {"app": (RequestProtocol.GRPC, backend_ports)}
        if http:
            apps["http-app"] = (RequestProtocol.HTTP, http)
        api.set_backend_configs({name: _backend(name, *app, stats) for name, app in apps.items()})
    api._generate_config_file_internal()
    return path


def _backend(name, protocol, ports, fallback):
    return BackendConfig(
        name=name,
        path_prefix="/",
        app_name="app",
        protocol=protocol,
        servers=[ServerConfig(name=f"ingress{n}", host="127.0.0.1", port=p) for n, p in enumerate(ports)],
        fallback_server=ServerConfig(name="fallback", host="127.0.0.1", port=fallback),  # where nothing answers
    )


@contextmanager
def haproxy(folder, backend_port, front=None, http=()):
    """Yields the port of gRPC once our program runs as HAProxy in front of a gRPC server of this machine; that of HTTP,
    where there are servers of HTTP."""
    ports = free_ports(4)
    path = write_config(folder, ports, None if backend_port is None else [backend_port], http)
    program = str(Path(sys.executable).parent / PROGRAM)
    process = subprocess.Popen(
        [program, "-f", str(path), "-db"],
        env={**os.environ, **(front or GrpcFront()).environment()},
        stderr=subprocess.PIPE,
    )
    try:
        await_port(process, ports[0])
        yield ports[1 if http else 0]
    finally:
        process.terminate()
        process.communicate()


MANAGER = """
import json, subprocess, sys
for line in sys.stdin:
    command = json.loads(line)
    print(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid, flush=True)
"""
RAYLET = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


class Manager:
    """Plays Serve's manager, which starts our program as HAProxy. raylet: puts a parent above it, as Ray does."""

    program = (str(Path(sys.executable).parent / PROGRAM),)

    def __init__(self, raylet=False):
        command = [sys.executable, "-c", *([RAYLET, MANAGER] if raylet else [MANAGER])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, config, *more):
        """Starts HAProxy as Serve does; returns the pid once it answers at the admin socket."""
        self.process.stdin.write(json.dumps([*self.program, "-db", "-f", str(config), "-dR", *more]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        until(lambda: pid_at(config.parent / "a.sock") == pid)
        return pid

    def reload(self, config, old):
        return self.start(config, "-sf", str(old), "-x", str(config.parent / "a.sock"))

    def kill(self):
        self.process.kill()
        self.process.communicate()


def pid_at(admin_socket):
    """The pid that Serve regards as the running HAProxy's."""
    with suppress(OSError):
        found = re.search(r"^Pid: (\d+)$", ask("show info\n", admin_socket), flags=re.MULTILINE)
        return int(found[1]) if found else None  # one that hands its sockets over may answer nothing


def check_of(admin_socket, server):
    """How HAProxy's last check of a server ended: "L7OK", "L7RSP" after an answer, "L7TOUT" after none in time."""
    rows = csv.DictReader(ask("show stat\n", admin_socket).splitlines())
    return next(row["check_status"] for row in rows if row["svname"] == server)


def children_of(pid):
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def supervisor_of(pid):
    """The child of our program that keeps HAProxy running."""
    return next(iter(children_of(pid)), None)


def haproxy_of(pid):
    """The grandchild of our program that is HAProxy."""
    return next((pid for child in children_of(pid) for pid in children_of(child) if is_haproxy(pid)), None)


def is_haproxy(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name == "haproxy"


def until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def await_port(process, port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise AssertionError("HAProxy does not listen")
