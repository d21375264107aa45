"""An HAProxy leaves, and with it all ingresses that it knows, while clients keep their connections to it."""

import ssl
import threading
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from haproxy_tools import Manager, free_ports, http_server, ingress, pid_at, until, write_config
from tls_files import Authority

from cluster.metrics.process import is_running
from cluster.runtime.front.tls import GrpcFront

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
ASKED = health_pb2.HealthCheckRequest()
CLIENT, END = b"127.0.0.1\n", b"end\n"
ANSWER = CLIENT + END


class Health(health_pb2_grpc.HealthServicer):
    def Check(self, request, context):
        return SERVING


@contextmanager
def http_ingress():
    """Yields its port, and the event for which the end of its `/slow` answers waits."""
    go_on = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.piece(f"{self.headers['x-forwarded-for']}\n".encode())
            if self.path == "/slow":
                go_on.wait(60)
            self.piece(END)
            self.wfile.write(b"0\r\n\r\n")

        def piece(self, data):
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def log_message(self, *_):
            pass

    with http_server(Handler) as port:
        yield port, go_on


@pytest.fixture
def manager():
    """Started by the test, which sets the environment before."""
    managers = []
    yield lambda: managers.append(Manager()) or managers[0]
    for manager in managers:
        manager.kill()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_calls_on_connections_to_the_one_that_left_reach_its_successor(tmp_path, monkeypatch, manager, secure):
    """A connection was idle at the reload, another one had a stream; HTTP/2's call has no retry. The successor sees
    the address of the client: limits count by it."""
    folder, ports, trusted = tmp_path / "ha", free_ports(4), ssl.create_default_context()
    folder.mkdir(mode=0o700)
    if secure:
        authority = Authority(tmp_path, "a")
        pair = authority.issue("server", server=True)
        trusted.load_verify_locations(authority.cert)
        for name, value in GrpcFront(tls_cert=pair.cert, tls_key=pair.key).environment().items():
            monkeypatch.setenv(name, value)
        credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes())
        channel = grpc.secure_channel(f"127.0.0.1:{ports[0]}", credentials, [("grpc.enable_retries", 0)])
    else:
        channel = grpc.insecure_channel(f"127.0.0.1:{ports[0]}", [("grpc.enable_retries", 0)])

    def connection():
        address = ("127.0.0.1", ports[1])
        return (
            HTTPSConnection(*address, timeout=60, context=trusted) if secure else HTTPConnection(*address, timeout=60)
        )

    ours, check = manager(), health_pb2_grpc.HealthStub(channel).Check
    with ExitStack() as old, ExitStack() as new, channel:
        port, go_on = old.enter_context(http_ingress())
        first = ours.start(write_config(folder, ports, [old.enter_context(ingress(Health()))], [port]))
        idle, busy = connection(), connection()
        idle.request("GET", "/")
        assert idle.getresponse().read() == ANSWER
        busy.request("GET", "/slow")
        stream = busy.getresponse()
        assert stream.readline() == CLIENT
        assert check(ASKED, timeout=60) == SERVING

        port, _ = new.enter_context(http_ingress())
        ours.reload(write_config(folder, ports, [new.enter_context(ingress(Health()))], [port]), first)
        until(lambda: pid_at(folder / f"i{first}") is None)  # it has begun to leave
        go_on.set()
        assert stream.read() == END
        old.close()
        for kept in (idle, busy):
            kept.request("GET", "/")
            answer = kept.getresponse()
            assert answer.status == 200
            assert answer.read() == ANSWER
            assert answer.getheader("connection") == "close"
        assert check(ASKED, timeout=60) == SERVING
        until(lambda: not is_running(first, None))
