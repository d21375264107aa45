"""HAProxy as we configure it, in front of a gRPC server of this process: its answers to clients, and their number."""

import socket
import threading
import time
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from haproxy_tools import free_ports, haproxy, ingress
from ray.serve.generated import serve_pb2, serve_pb2_grpc

STREAMS = 150  # of one connection: Serve's own setting lets 100 through
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class Ingress(health_pb2_grpc.HealthServicer):
    """Check answers; Watch answers once, and again when the test lets it go on."""

    def __init__(self):
        self.go_on = threading.Event()

    def Check(self, request, context):
        return SERVING

    def Watch(self, request, context):
        yield SERVING
        self.go_on.wait(30)
        yield SERVING


@pytest.fixture
def server():
    servicer = Ingress()
    with ingress(servicer) as servicer.port:
        yield servicer
        servicer.go_on.set()


def check(channel):
    try:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def watch(channel):
    try:
        return len(list(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)))
    except grpc.RpcError as error:
        return error.code().name


def test_150_streams_and_a_health_call_share_a_connection(tmp_path, server):
    with haproxy(tmp_path, server.port) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(STREAMS)]
        assert [next(watch) for watch in watches] == [SERVING] * STREAMS
        assert check(channel) == "OK"
        server.go_on.set()
        assert [len(list(watch)) for watch in watches] == [1] * STREAMS


def test_a_health_call_of_many_bytes_is_refused_before_it_reaches_an_ingress(tmp_path, server):
    """It needs no key, so its bytes are bounded; other calls need one."""
    with haproxy(tmp_path, server.port) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for size in (4096, 1_000_000):
            large = health_pb2.HealthCheckRequest(service="x" * size)
            with pytest.raises(grpc.RpcError) as caught:
                health_pb2_grpc.HealthStub(channel).Check(large, timeout=60)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "too many bytes" in caught.value.details()
        small = health_pb2.HealthCheckRequest(service="x" * 1000)
        assert health_pb2_grpc.HealthStub(channel).Check(small, timeout=60) == SERVING
        assert check(channel) == "OK"


def test_before_an_application_is_known_calls_are_to_be_tried_again(tmp_path):
    """Serve's own answer is NOT_FOUND, after which no client tries again."""
    with haproxy(tmp_path, None) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert (check(channel), watch(channel)) == ("UNAVAILABLE", "UNAVAILABLE")
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=10, metadata=[("application", "moe-cluster")])
        assert (caught.value.code().name, caught.value.details()) == (
            "UNAVAILABLE",
            "the server is starting: try again",
        )


def test_without_a_living_ingress_calls_are_to_be_tried_again(tmp_path):
    """Serve's own page for it has status 500, which gRPC takes as UNKNOWN."""
    with haproxy(tmp_path, *free_ports(1)) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert (check(channel), watch(channel)) == ("UNAVAILABLE", "UNAVAILABLE")


def test_a_call_whose_ingress_dies_is_to_be_tried_again(tmp_path):
    """An ingress that takes a connection and speaks HTTP/2, and closes it after a call, before its header."""
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def take_and_close():
            with suppress(OSError):
                while True:
                    connection, _ = dying.accept()
                    connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # an empty SETTINGS frame
                    connection.recv(1 << 16)
                    time.sleep(0.1)
                    connection.close()

        threading.Thread(target=take_and_close, daemon=True).start()
        with haproxy(tmp_path, dying.getsockname()[1]) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert (check(channel), watch(channel)) == ("UNAVAILABLE", "UNAVAILABLE")
        dying.shutdown(socket.SHUT_RDWR)


def test_serves_list_of_applications_is_not_for_clients(tmp_path, server):
    with haproxy(tmp_path, server.port) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = serve_pb2_grpc.RayServeAPIServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListApplications(serve_pb2.ListApplicationsRequest(), timeout=10)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
