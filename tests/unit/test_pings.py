"""Keep-alive pings during a unary call that sends nothing, to the gRPC server that Serve makes."""

import asyncio
import importlib
import socket
import threading
import time
from contextlib import suppress

import pytest
from ray.serve._private import constants, grpc_util
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve._private.haproxy import build_grpc_healthcheck_request_hex
from ray.serve.config import gRPCOptions

from cluster.runtime.front.haproxy import ray_environment
from cluster.runtime.front.serve_proxy import accept_pings

CALL_S = 1.5
PING = b"\0\0\x08\x06\0\0\0\0\0ping...."
GOAWAY = 7


def frames(sock):
    """(type, payload) of each HTTP/2 frame until the connection ends, or nothing comes for a while."""
    with sock.makefile("rb") as stream:
        try:
            while len(head := stream.read(9)) == 9:
                yield head[3], stream.read(int.from_bytes(head[:3], "big"))
        except TimeoutError:
            return


def call_with_pings(port):
    """A unary call on a connection of its own, with a ping every tenth of a second: what the server said of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=CALL_S + 1.5) as sock:
        sock.sendall(bytes.fromhex(build_grpc_healthcheck_request_hex("/moecluster.v1.InferenceService/Generate")))

        def ping():
            with suppress(OSError):  # the server has closed
                for _ in range(10):
                    time.sleep(0.1)
                    sock.sendall(PING)

        pinging = threading.Thread(target=ping)
        pinging.start()
        found = list(frames(sock))
        pinging.join()
    return [payload[8:].decode() for kind, payload in found if kind == GOAWAY], any(b"answer" in p for _, p in found)


async def at_serves_server():
    def handler(service_method, streaming_type):
        async def answer(request, context):
            await asyncio.sleep(CALL_S)
            return b"answer"

        return answer

    (port_holder := socket.socket()).bind(("127.0.0.1", 0))
    port = port_holder.getsockname()[1]
    port_holder.close()
    options = gRPCOptions(port=port, grpc_servicer_functions=["cluster.runtime.proxy.add_inference_service"])
    task, server = await start_grpc_server(handler, options, event_loop=asyncio.get_running_loop())
    answer = await asyncio.to_thread(call_with_pings, port)
    await server.stop(None)
    task.cancel()
    return answer


@pytest.fixture
def serves_options(monkeypatch):
    """Serve's list, as it is in a new process."""
    options = [option for option in constants.DEFAULT_GRPC_SERVER_OPTIONS if "ping" not in option[0]]
    for module in (constants, grpc_util):
        monkeypatch.setattr(module, "DEFAULT_GRPC_SERVER_OPTIONS", options)
    monkeypatch.setattr("cluster.runtime.front.serve_proxy.DEFAULT_GRPC_SERVER_OPTIONS", options)
    return options


def test_serves_own_server_ends_a_connection_after_some_pings(serves_options):
    assert asyncio.run(at_serves_server())[0] == ["too_many_pings"]


def test_with_our_setting_the_call_is_answered(serves_options):
    assert accept_pings() == accept_pings() == []
    assert len([option for option in serves_options if "ping" in option[0]]) == 1
    assert asyncio.run(at_serves_server()) == ([], True)


def test_serve_is_told_of_it_on_every_ray_that_we_set_up():
    """By a name that users' environments keep, whichever module has the function."""
    module, _, name = ray_environment()["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is accept_pings
