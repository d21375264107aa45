"""TLS in front of gRPC: HAProxy itself, on the configuration that Serve writes and we adapt, with real certificates.

Behind it stands a plain gRPC server of this process instead of an ingress.
"""

import socket
import ssl
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from haproxy_tools import haproxy, ingress
from tls_files import Authority

from cluster.client.grpc_client import Client, TlsFiles
from cluster.errors import SetupError, Unavailable
from cluster.runtime.front.renewal import INTERVAL_S, Copy
from cluster.runtime.front.tls import GrpcFront

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def server_pair(authority):
    return authority.issue("server", server=True)


@pytest.fixture(scope="module")
def client_pair(authority):
    return authority.issue("client", server=False)


class Backend(health_pb2_grpc.HealthServicer):
    """Remembers the metadata of the last call."""

    metadata = None

    def __init__(self):
        self.go_on = threading.Event()

    def Check(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        return SERVING

    def Watch(self, request, context):
        yield SERVING
        self.go_on.wait(30)
        yield SERVING


@pytest.fixture
def backend():
    servicer = Backend()
    with ingress(servicer) as servicer.port:
        yield servicer


def is_serving(port, **how):
    with Client(f"127.0.0.1:{port}", **how) as client:
        return client.is_serving(timeout_s=5.0)


def test_only_who_speaks_tls_and_trusts_the_certificate_is_answered(
    tmp_path, backend, authority, server_pair, client_pair
):
    front = GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key)
    stranger = Authority(tmp_path, "strangers")
    with haproxy(tmp_path, backend.port, front) as port:
        assert is_serving(port, tls=TlsFiles(ca=authority.cert))
        assert backend.metadata["x-forwarded-for"] == "127.0.0.1"
        assert is_serving(port, tls=TlsFiles(ca=authority.cert, cert=client_pair.cert, key=client_pair.key))
        assert not is_serving(port)
        assert not is_serving(port, tls=TlsFiles(ca=stranger.cert))


def test_without_a_certificate_of_ours_no_client_comes_in(tmp_path, backend, authority, server_pair, client_pair):
    front = GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key, tls_client_ca=authority.cert)
    foreign = Authority(tmp_path, "strangers").issue("client", server=False)
    with haproxy(tmp_path, backend.port, front) as port:
        assert is_serving(port, tls=TlsFiles(ca=authority.cert, cert=client_pair.cert, key=client_pair.key))
        backend.metadata = None
        assert not is_serving(port, tls=TlsFiles(ca=authority.cert))
        assert not is_serving(port, tls=TlsFiles(ca=authority.cert, cert=foreign.cert, key=foreign.key))
        assert not is_serving(port)
        assert backend.metadata is None


def test_tls_is_1_2_at_least_and_http_2(tmp_path, backend, authority, server_pair):
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.set_alpn_protocols(["h2", "http/1.1"])
    old = ssl.create_default_context(cafile=str(authority.cert))
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")  # else this side would not even try
    with haproxy(tmp_path, backend.port, GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key)) as port:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as sock:
            assert sock.version() in ("TLSv1.2", "TLSv1.3")
            assert sock.selected_alpn_protocol() == "h2"
        with pytest.raises(ssl.SSLError):
            old.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost")


def test_certificate_and_key_may_be_one_file_and_our_copy_is_for_this_user_only(
    tmp_path, backend, authority, server_pair
):
    both = tmp_path / "both.pem"
    both.write_bytes(server_pair.cert.read_bytes() + server_pair.key.read_bytes())
    with haproxy(tmp_path, backend.port, GrpcFront(tls_cert=both)) as port:
        assert is_serving(port, tls=TlsFiles(ca=authority.cert))
        [copy] = tmp_path.glob("grpc*")
        assert copy.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def renewable(tmp_path, authority):
    """A server's pair in files, and a function that renews them."""
    pair = authority.issue("renewable", server=True)
    folder = tmp_path / "mounted"
    folder.mkdir()
    front = GrpcFront(tls_cert=folder / "tls.crt", tls_key=folder / "tls.key")

    def install(cert, key):
        front.tls_cert.write_bytes(cert.read_bytes())
        front.tls_key.write_bytes(key.read_bytes())

    install(pair.cert, pair.key)
    return front, install


def certificate(port, authority):
    """The server's certificate, as a new client sees it."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as sock:
        return sock.getpeercert(binary_form=True)


def until(condition):
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def der(pem):
    return ssl.PEM_cert_to_DER_cert(pem.read_text())


def test_a_renewed_certificate_counts_within_seconds_and_cuts_no_stream(tmp_path, backend, authority, renewable):
    front, install = renewable
    trust = grpc.ssl_channel_credentials(authority.cert.read_bytes())
    with (
        haproxy(tmp_path, backend.port, front) as port,
        grpc.secure_channel(f"127.0.0.1:{port}", trust) as channel,
    ):
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(stream) == SERVING
        assert certificate(port, authority) == der(front.tls_cert)
        for name in ("renewed", "renewed again"):
            renewed = authority.issue(name, server=True)
            install(renewed.cert, renewed.key)
            until(lambda: certificate(port, authority) == der(renewed.cert))  # noqa: B023 (it is called at once)
        backend.go_on.set()
        assert next(stream) == SERVING


def test_half_of_a_renewal_leaves_what_was_there(tmp_path, backend, authority, renewable):
    """The certificate is written, its key not yet; then the key."""
    front, install = renewable
    old_key = tmp_path / "old.key"
    old_key.write_bytes(front.tls_key.read_bytes())
    with haproxy(tmp_path, backend.port, front) as port:
        before = certificate(port, authority)
        renewed = authority.issue("renewed", server=True)
        install(renewed.cert, old_key)
        time.sleep(2 * INTERVAL_S + 0.5)
        assert certificate(port, authority) == before
        install(renewed.cert, renewed.key)
        until(lambda: certificate(port, authority) != before)


def test_a_haproxy_that_starts_in_the_middle_of_a_renewal_serves_what_was_there(
    tmp_path, backend, authority, renewable, client_pair
):
    front, install = renewable
    with haproxy(tmp_path, backend.port, front) as port:
        before = certificate(port, authority)
    install(client_pair.cert, front.tls_key)
    with haproxy(tmp_path, backend.port, SimpleNamespace(environment=lambda: environment(front))) as port:
        assert certificate(port, authority) == before


def test_what_stays_is_never_of_another_configuration(tmp_path, backend, authority, server_pair):
    """The former list of clients' authorities must not let the former clients in."""
    front = GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key, tls_client_ca=authority.cert)
    with haproxy(tmp_path, backend.port, front):
        pass
    other = tmp_path / "other.pem"
    other.write_text("not a certificate")
    changed = {**environment(front), "MOE_CLUSTER_TLS_CLIENT_CA": str(other)}
    with (
        pytest.raises(AssertionError, match="no PEM block"),
        haproxy(tmp_path, backend.port, SimpleNamespace(environment=lambda: changed)),
    ):
        pass


def test_comments_of_any_encoding_and_a_key_with_a_password(tmp_path, authority, server_pair):
    commented = tmp_path / "ca.pem"
    commented.write_bytes("# Behörde\n\n".encode("latin-1") + authority.cert.read_bytes())
    copy = Copy(tmp_path / "copy.pem", "ca-file", [str(commented)])
    copy.write(copy.wanted())
    assert copy.path.read_bytes() == authority.cert.read_bytes()
    key = load_pem_private_key(server_pair.key.read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    with pytest.raises(ValueError, match="password"):
        Copy(tmp_path / "pair.pem", "cert", []).write(server_pair.cert.read_bytes() + locked)
    assert not list(tmp_path.glob("pair*"))


def environment(front):
    """HAProxy starts without the check of `moe-cluster serve`."""
    return {"MOE_CLUSTER_TLS_CERT": str(front.tls_cert), "MOE_CLUSTER_TLS_KEY": str(front.tls_key)}


def test_a_changed_list_of_clients_authorities_counts_too(tmp_path, backend, authority, server_pair, client_pair):
    """A client of the old list is no longer let in. The new list is longer than a command of HAProxy's may be."""
    former, allowed = Authority(tmp_path, "former"), tmp_path / "clients.pem"
    others = [Authority(tmp_path, f"other-{n}") for n in range(40)]
    allowed.write_bytes(former.cert.read_bytes())
    front = GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key, tls_client_ca=allowed)
    ours = TlsFiles(ca=authority.cert, cert=client_pair.cert, key=client_pair.key)
    pair = former.issue("client", server=False)
    formers = TlsFiles(ca=authority.cert, cert=pair.cert, key=pair.key)
    with haproxy(tmp_path, backend.port, front) as port:
        assert is_serving(port, tls=formers)
        assert not is_serving(port, tls=ours)
        allowed.write_bytes(b"".join(each.cert.read_bytes() for each in (*others, authority)))
        assert allowed.stat().st_size > 16384
        until(lambda: is_serving(port, tls=ours))
        assert not is_serving(port, tls=formers)


def test_without_tls_plain_grpc_is_served_where_it_is_asked_for(tmp_path, backend):
    with haproxy(tmp_path, backend.port, GrpcFront()) as port:
        assert is_serving(port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    with haproxy(tmp_path, backend.port, GrpcFront(host="0.0.0.0")) as port:
        assert is_serving(port)
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_files_that_cannot_serve_are_refused_before_anything_starts(tmp_path, authority, server_pair, missing):
    paths = {"cert": server_pair.cert, "key": server_pair.key, "ca": authority.cert, missing: tmp_path / "nothing"}
    with pytest.raises(SetupError, match=r"nothing.* cannot be used"):
        GrpcFront(tls_cert=paths["cert"], tls_key=paths["key"], tls_client_ca=paths["ca"]).environment()


@pytest.mark.parametrize("broken", ["cert", "key", "ca"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00junk", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_file_that_is_no_pem_is_refused_with_what_is_needed(tmp_path, authority, server_pair, broken, content):
    (tmp_path / "junk").write_bytes(content)
    paths = {"cert": server_pair.cert, "key": server_pair.key, "ca": authority.cert, broken: tmp_path / "junk"}
    with pytest.raises(SetupError, match=r"junk.* cannot be used: PEM text is needed, with a block -----BEGIN"):
        GrpcFront(tls_cert=paths["cert"], tls_key=paths["key"], tls_client_ca=paths["ca"]).environment()


def test_a_key_of_another_certificate_is_refused(authority, server_pair, client_pair):
    with pytest.raises(SetupError, match="cannot be used"):
        GrpcFront(tls_cert=server_pair.cert, tls_key=client_pair.key).environment()


def test_a_key_without_a_certificate_is_refused(server_pair, authority):
    with pytest.raises(SetupError, match="need --tls-cert"):
        GrpcFront(tls_key=server_pair.key).environment()
    with pytest.raises(SetupError, match="need --tls-cert"):
        GrpcFront(tls_client_ca=authority.cert).environment()


def test_a_client_that_is_not_let_in_hears_that_it_may_be_tls(tmp_path, backend, authority, server_pair, client_pair):
    front = GrpcFront(tls_cert=server_pair.cert, tls_key=server_pair.key, tls_client_ca=authority.cert)
    foreign = Authority(tmp_path, "strangers")
    with haproxy(tmp_path, backend.port, front) as port:
        for tls in (None, TlsFiles(ca=authority.cert), TlsFiles(ca=foreign.cert)):
            with Client(f"127.0.0.1:{port}", tls=tls) as client, pytest.raises(Unavailable, match="--tls-ca"):
                client.model_info()


def test_a_client_says_what_is_wrong_with_its_files(tmp_path, client_pair):
    with pytest.raises(SetupError, match="both --tls-cert and --tls-key"):
        Client("127.0.0.1:1", tls=TlsFiles(cert=client_pair.cert))
    with pytest.raises(SetupError, match="nothing cannot be read"):
        Client("127.0.0.1:1", tls=TlsFiles(ca=tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("host", "address"), [("", "127.0.0.1:9000"), ("0.0.0.0", "0.0.0.0:9000"), ("::", "[::]:9000")]
)
def test_the_address_that_a_user_is_told_is_the_one_that_listens(host, address):
    assert GrpcFront(host=host).address(9000) == address
    assert GrpcFront(host=host, tls_cert=Path("server.crt")).address(9000) == address + " (TLS)"
