"""Loopback is reached past a proxy of the environment, which does not exist here."""

from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.client.direct import grpc_options, is_direct, read_url
from cluster.client.grpc_client import Client

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
DIRECT = [("grpc.enable_http_proxy", 0)]


@pytest.fixture(autouse=True)
def dead_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:1")


@pytest.fixture
def health_port():
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def test_grpcs_own_channel_would_ask_the_proxy(health_port):
    """Else the tests below could not fail."""
    with grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "ipv4:127.0.0.1", "dns:///localhost", "0.0.0.0"])
def test_a_client_reaches_a_server_of_this_machine(health_port, host):
    with Client(f"{host}:{health_port}") as client:
        assert client.is_serving(timeout_s=60)


def test_metrics_of_this_machine_are_read():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"page 1")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.handle_request).start()
        assert read_url(f"http://127.0.0.1:{server.server_port}/metrics", timeout_s=20) == "page 1"


def test_other_hosts_are_reached_as_the_environment_says(monkeypatch):
    assert not is_direct("gpu7.example.com")
    assert grpc_options("gpu7.example.com:9000") == grpc_options("10.1.2.3:9000") == []
    monkeypatch.setenv("no_proxy", ".example.com, 10.1.2.3")
    assert grpc_options("gpu7.example.com:9000") == grpc_options("10.1.2.3:9000") == DIRECT
    assert not is_direct("example.org")
    with pytest.raises(OSError, match="refused"):
        read_url("http://example.org/metrics", timeout_s=20)


def test_of_several_addresses_the_first_is_the_servers_name():
    """gRPC's own is all of them, with commas: that is no name, and HAProxy refuses a call with it."""
    assert grpc_options("ipv4:10.1.2.3:9000,10.1.2.4:9000") == [("grpc.default_authority", "10.1.2.3:9000")]
    assert grpc_options("ipv4:127.0.0.1:1,127.0.0.1:2") == [*DIRECT, ("grpc.default_authority", "127.0.0.1:1")]
    assert grpc_options("ipv4:127.0.0.1:1,10.1.2.4:2") == [("grpc.default_authority", "127.0.0.1:1")]
    assert grpc_options("unix:/run/a,b:c") == DIRECT


@pytest.mark.parametrize("target", ["[::1]:9000", "unix:/run/x.sock", "127.8.9.1:1", "LOCALHOST:9000", "a.localhost:1"])
def test_every_way_to_name_this_machine_is_direct(target):
    assert grpc_options(target) == DIRECT
