"""The sockets on which a served cluster listens, as the kernel lists them, and their answers to a stranger."""

import os
import socket
from contextlib import suppress
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from urllib.request import Request, urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2
from ray.serve.generated import serve_pb2

from cluster.pb.moecluster.v1 import inference_pb2

pytestmark = pytest.mark.ray

LISTEN = "0A"
REFUSALS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


def family(pid):
    """The process and all that it started."""
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(found for part in children for child in part for found in family(int(child)))]


def sockets(pid):
    """The inodes of its sockets."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except OSError:
            continue  # closed meanwhile
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def as_address(text):
    """From /proc/net: 32-bit words of the host's byte order, in hex."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    address = ip_address(raw)
    return getattr(address, "ipv4_mapped", None) or address


@pytest.fixture
def listening(served):
    """(command, address, port) of every TCP socket that this process or one that it started listens on."""
    owners = {inode: pid for pid in family(os.getpid()) for inode in sockets(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and words[9] in owners:
                host, port = words[1].split(":")
                command = Path(f"/proc/{owners[words[9]]}/cmdline").read_text().split("\0")[0]
                found.append((command, as_address(host), int(port, 16)))
    return found


def test_a_cluster_of_one_machine_listens_on_loopback_but_where_serve_cannot(listening, served):
    """Serve binds an ingress's gRPC, its fallback proxy's and the calls between deployments to all interfaces."""
    ports = {port for _, _, port in listening}
    assert served.grpc_port in ports  # HAProxy's, so the list is whole
    assert len(ports) > 10
    elsewhere = [entry for entry in listening if not entry[1].is_loopback]
    assert [entry for entry in elsewhere if not entry[0].startswith(("ray::ServeReplica", "ray::ProxyActor"))] == []
    assert 8265 not in ports  # Ray's dashboard


def test_what_listens_on_all_interfaces_answers_no_stranger(listening):
    """Each rpc of ours and of Serve's internal service, from this machine's outer address and without a token."""
    outer = outer_address()
    services = (
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        serve_pb2.DESCRIPTOR.services_by_name["ASGIService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    )
    methods = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    open_ports = [port for _, address, port in listening if not address.is_loopback]
    assert open_ports
    for port in open_ports:
        with grpc.insecure_channel(f"{outer}:{port}") as channel:
            heard = {method: ask(channel, method) for method in methods}
        assert [method for method, (messages, _) in heard.items() if any(messages)] == [], port
        assert {code for _, code in heard.values()} & REFUSALS, (port, heard)


def outer_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: finds the route
        except OSError:
            pytest.skip("this machine has no way to others")
        host = probe.getsockname()[0]
    if ip_address(host).is_loopback:
        pytest.skip("this machine has no address but loopback")
    return host


def ask(channel, method):
    """The messages that came, and the code. Serve's fallback proxy ends a refused stream with OK and no message, and
    puts an empty one before a unary refusal."""
    call, messages = channel.unary_stream(method)(b"", timeout=10), []
    with suppress(grpc.RpcError):
        messages += call
    return messages, call.code()


def test_rays_own_http_says_nothing_to_a_stranger(listening):
    """Nor does Serve's. HAProxy's metrics and our own are for any scraper, those over HTTP, too."""
    heard = {}
    for command, _, port in listening:
        if command.startswith("ray::NodeMetrics") or command.endswith("haproxy"):
            continue
        for path in ("/metrics", "/api/jobs/", "/api/serve/applications/", "/api/v0/actors", "/logs"):
            with suppress(OSError, HTTPException):
                request = Request(f"http://127.0.0.1:{port}{path}")
                with urlopen(request, timeout=5) as answer:
                    text = answer.read().decode(errors="replace")
                    if path != "/metrics" or "moecluster_build_info" not in text:
                        heard[port, path] = text
    assert len(listening) > 20
    assert heard == {}
