"""Addresses at which a Ray has ended, or never was: said within seconds, where Ray itself looks for two minutes."""

import socket
import sys
from contextlib import closing
from threading import Thread

import pytest
from ray._private import services

from cluster.errors import SetupError
from cluster.runtime.start import ray_address
from cluster.runtime.start.ray_address import find_ray


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, tmp_path):
    """Hides the Rays of this machine, where another test's may run."""
    monkeypatch.setattr(services, "find_gcs_addresses", list)
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_address, "ANSWER_TIMEOUT_S", 1.0)


@pytest.fixture
def dead_port():
    server = socket.create_server(("127.0.0.1", 0))
    with closing(server):
        return server.getsockname()[1]


@pytest.fixture
def silent_port():
    """Takes connections and says nothing, as a stopped process does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web_port():
    def answer():
        while True:
            try:
                with closing(server.accept()[0]) as connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_a_dead_address_is_refused_before_ray_loads(dead_port, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray._private.grpc_utils", None)
    with pytest.raises(SetupError, match=rf"no Ray answers at 127\.0\.0\.1:{dead_port} .*refused.*ray start --head"):
        find_ray(f"127.0.0.1:{dead_port}")


def test_a_dead_address_of_rays_client_is_refused_at_once(dead_port):
    """Ray's client tries for over 10 s."""
    with pytest.raises(SetupError, match=f"no Ray answers at ray://127.0.0.1:{dead_port} .*another --ray-address"):
        find_ray(f"ray://127.0.0.1:{dead_port}")


@pytest.mark.parametrize("kind", ["silent_port", "web_port"])
def test_what_listens_and_is_no_ray_is_refused(kind, request):
    port = request.getfixturevalue(kind)
    with pytest.raises(SetupError, match=f"no Ray answers at localhost:{port} .*something else listens"):
        find_ray(f"localhost:{port}")


@pytest.mark.parametrize(
    "address",
    [
        "x",
        "a:b",
        ":",
        "127.0.0.1:",
        "local",
        "[::1]:99999999",
        "no host:1",
        "\udcff:1",
        "http://a:1",
        "ray://",
        "ray://x",
        "://:1",
        "a/b:1",
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(SetupError):
        find_ray(address)


@pytest.mark.parametrize("asked", ["auto", None])
def test_what_a_dead_cluster_left_is_refused_by_name(asked, dead_port, monkeypatch):
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: f"127.0.0.1:{dead_port}")
    with pytest.raises(
        SetupError, match=rf"no running Ray cluster was found .*127\.0\.0\.1:{dead_port}.*--ray-address"
    ):
        find_ray(asked)


def test_without_any_ray_the_hint_says_what_to_do():
    with pytest.raises(SetupError, match="no running Ray cluster was found: give --ray-address"):
        find_ray("auto")


@pytest.mark.ray
def test_a_ray_that_answers_is_found_beside_dead_ones(ray_cluster, dead_port, monkeypatch):
    living = ray_cluster.get_runtime_context().gcs_address
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: f"127.0.0.1:{dead_port}")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: [living])
    assert find_ray("auto") == find_ray(living) == living
