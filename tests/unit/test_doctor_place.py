"""The doctor around a server: ports, running servers, the address of Ray, room for models."""

import resource
import socket

import pytest

from cluster.doctor import network
from cluster.doctor.network import examine_network, taken
from cluster.doctor.room import examine_room
from cluster.footprint.servers import Server


@pytest.fixture
def listener():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def examined(environment=None):
    return {finding.subject: finding for finding in examine_network(environment or {})}


def test_a_port_is_taken_while_something_listens_there(listener):
    port = listener.getsockname()[1]
    assert "in use" in taken(port)
    listener.close()
    assert taken(port) == ""


def test_a_taken_port_has_an_advice_unless_it_is_of_our_server(monkeypatch, listener):
    port = listener.getsockname()[1]
    monkeypatch.setattr(network, "PORTS", {"--grpc-port": (port, "gRPC")})
    monkeypatch.setattr(network, "servers", list)
    assert examined()[f"port {port}"].advice == "`moe-cluster serve --grpc-port 0` takes a free one"
    ours = Server(ray_address="127.0.0.1:1", grpc_address=f"127.0.0.1:{port}", model="m", environment={"token": "x"})
    monkeypatch.setattr(network, "servers", lambda: [ours])
    assert examined()[f"port {port}"].advice == ""
    assert examined()["server"].found == f"m runs here: gRPC 127.0.0.1:{port}, Ray 127.0.0.1:1"


@pytest.mark.parametrize(
    ("address", "dead"), [("127.0.0.1:1", True), ("auto", False), ("ray://host:10001", False), ("127.0.0.1:x", False)]
)
def test_an_address_of_ray_where_nothing_listens_has_an_advice(address, dead):
    assert ("no Ray answers" in examined({"RAY_ADDRESS": address})["Ray's address"].advice) == dead
    assert "Ray's address" not in examined({})


def test_few_open_files_have_an_advice(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert "ulimit -n" in examined()["open files"].advice
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "open files" not in examined()


@pytest.mark.parametrize(
    ("gigabytes", "fit"),
    [(0.5, []), (2, ["Qwen2.5-0.5B"]), (32, ["Qwen2.5-0.5B", "Qwen1.5-MoE-A2.7B"]),
     (200, ["Qwen2.5-0.5B", "Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B"])],
)  # fmt: skip
def test_models_that_fit_are_named_before_those_that_do_not(gigabytes, fit):
    """0.99, 28.6 and 115 GB of weights, of nine tenths of the memory."""
    roomy, _, rest = examine_room(gigabytes * 1e9, "memory").found.partition("no room for")
    assert [name for name in ("Qwen2.5-0.5B", "Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B") if name in roomy] == fit
    assert bool(rest) == (len(fit) < 3)
