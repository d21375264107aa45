"""Our program as HAProxy, with the configuration that Serve writes for one gRPC server behind it."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc
from ray.serve._private.common import RequestProtocol
from ray.serve._private.constants import HEALTHY_MESSAGE
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from cluster.runtime.grpc_front import GrpcFront
from cluster.runtime.haproxy import PROGRAM, SERVE_ENVIRONMENT


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Healthz(serve_pb2_grpc.RayServeAPIServiceServicer):
    """What Serve has HAProxy ask each ingress. The list is for nobody."""

    def Healthz(self, request, context):
        return serve_pb2.HealthzResponse(message=HEALTHY_MESSAGE)

    def ListApplications(self, request, context):
        return serve_pb2.ListApplicationsResponse(application_names=["secret"])


@contextmanager
def ingress(servicer, port=0):
    """A gRPC server of this process with the health service; yields its port."""
    server = grpc.server(ThreadPoolExecutor(300))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    serve_pb2_grpc.add_RayServeAPIServiceServicer_to_server(Healthz(), server)
    try:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        yield bound
    finally:
        server.stop(None)


def write_config(folder, port, backend_ports):
    """What Serve writes for an application with an ingress at each of the ports; for no application when it is None."""
    http, metrics, stats = free_ports(3)
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
        h2_fe_max_concurrent_streams=int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS"]),
    )
    api = HAProxyApi(cfg=config, config_file_path=str(path))
    if backend_ports is not None:
        servers = [ServerConfig(name=f"ingress{n}", host="127.0.0.1", port=p) for n, p in enumerate(backend_ports)]
        app = BackendConfig(
            name="app",
            path_prefix="/",
            app_name="app",
            protocol=RequestProtocol.GRPC,
            servers=servers,
            fallback_server=ServerConfig(name="fallback", host="127.0.0.1", port=stats),  # where no gRPC is spoken
        )
        api.set_backend_configs({"app": app})
    api._generate_config_file_internal()
    return path


@contextmanager
def haproxy(folder, backend_port, front=None):
    """Yields the port of gRPC once our program runs as HAProxy in front of a gRPC server of this machine."""
    (port,) = free_ports(1)
    path = write_config(folder, port, None if backend_port is None else [backend_port])
    program = str(Path(sys.executable).parent / PROGRAM)
    process = subprocess.Popen(
        [program, "-f", str(path), "-db"],
        env={**os.environ, **(front or GrpcFront()).environment()},
        stderr=subprocess.PIPE,
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
