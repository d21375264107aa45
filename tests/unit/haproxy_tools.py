"""Our program as HAProxy, with the configuration that Serve writes for one gRPC server behind it."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.runtime.haproxy import PROGRAM


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def haproxy(folder, backend_port, front):
    """Yields the port of gRPC once our program runs as HAProxy in front of a gRPC server of this machine."""
    http, port, metrics, stats = free_ports(4)
    path = folder / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=http),
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=["any"]),
        socket_path=str(folder / "a.sock"),
        metrics_socket_path=str(folder / "m.sock"),
        metrics_port=metrics,
        stats_port=stats,
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        is_head=True,
    )
    api = HAProxyApi(cfg=config, config_file_path=str(path))
    server = ServerConfig(name="ingress", host="127.0.0.1", port=backend_port)
    unchecked = {"grpc_health_check_path": None}  # Serve's own question, which only its replicas answer
    app = BackendConfig(
        name="app", path_prefix="/", app_name="app", protocol=RequestProtocol.GRPC, servers=[server], **unchecked
    )
    api.set_backend_configs({"app": app})
    api._generate_config_file_internal()
    program = str(Path(sys.executable).parent / PROGRAM)
    process = subprocess.Popen(
        [program, "-f", str(path), "-db"], env={**os.environ, **front.environment()}, stderr=subprocess.PIPE
    )
    try:
        await_port(process, port)
        yield port
    finally:
        process.kill()
        process.communicate()


def await_port(process, port):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("HAProxy does not listen")
