"""HAProxy before HTTP, on the configuration that Serve writes and we adapt. Its ingresses are servers of the test."""

import json
import socket
import ssl
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler

import httpx2
import pytest
from haproxy_tools import free_ports, haproxy, http_server, until
from tls_files import Authority

from cluster.runtime.front.tls import GrpcFront


class Ingress(BaseHTTPRequestHandler):
    """Answers with the headers that came; `deadly` makes it close a connection without an answer."""

    protocol_version = "HTTP/1.1"
    deadly, num_deaths = False, 0

    def do_GET(self):
        self.answer()

    def do_POST(self):
        if self.path == "/at-once":
            self.rfile.read(1)
            self.close_connection = True
            self.answer()
            return
        self.rfile.read(int(self.headers["content-length"]))
        if self.deadly:
            type(self).num_deaths += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.answer()

    def answer(self):
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def ingress(deadly=False):
    handler = type("OneIngress", (Ingress,), {"deadly": deadly})
    with http_server(handler) as port:
        yield port, handler


def answered(client, url, **options):
    """The first answer that is not HAProxy's word that no server is up yet."""

    def ask():
        with suppress(httpx2.TransportError):
            response = client.get(url, **options)
            return None if response.status_code == 503 else response

    return until(ask)


def test_with_tls_calls_come_by_tls_and_probes_in_plain_text(tmp_path):
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("server", server=True)
    front = GrpcFront(tls_cert=pair.cert, tls_key=pair.key)
    folder = tmp_path / "ha"
    folder.mkdir(mode=0o700)
    trusting = ssl.create_default_context(cafile=authority.cert)
    with ingress() as (port, _), haproxy(folder, 1, front, http=[port]) as http:
        with httpx2.Client(verify=trusting) as client:
            sent = {"x-forwarded-for": "192.0.2.1", "x-request-timeout-seconds": "1"}
            seen = answered(client, f"https://127.0.0.1:{http}/v1/models", headers=sent).json()
            assert seen["x-forwarded-for"] == "127.0.0.1"
            assert "x-request-timeout-seconds" not in seen
        with httpx2.Client() as client:
            assert client.get(f"http://127.0.0.1:{http}/-/healthz").status_code == 200
            refused = client.get(f"http://127.0.0.1:{http}/v1/models")
            assert (refused.status_code, "https" in refused.json()["error"]["message"]) == (403, True)
            with pytest.raises(httpx2.ConnectError, match="certificate"):
                client.get(f"https://127.0.0.1:{http}/v1/models")


@pytest.mark.parametrize("num_bytes", [2, 50_000])
def test_a_call_of_a_dying_ingress_goes_to_another_one(tmp_path, num_bytes):
    """Each death is of a server that has the whole call and has sent nothing back. HAProxy's own buffer of 16 kB would
    let the larger ones fail."""
    tmp_path.chmod(0o700)
    with (
        ingress(deadly=True) as (dying, handler),
        ingress() as (living, _),
        haproxy(tmp_path, 1, http=[dying, living]) as http,
        httpx2.Client() as client,
    ):
        answered(client, f"http://127.0.0.1:{http}/v1/models")
        answers = [client.post(f"http://127.0.0.1:{http}/v1/completions", content=b" " * num_bytes) for _ in range(8)]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert handler.num_deaths


def test_without_an_ingress_clients_are_told_to_come_again_in_openais_shape(tmp_path):
    tmp_path.chmod(0o700)
    [nobody] = free_ports(1)
    with haproxy(tmp_path, 1, http=[nobody]) as http, httpx2.Client(timeout=30) as client:
        refused = client.post(f"http://127.0.0.1:{http}/v1/completions", json={})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        assert client.get(f"http://127.0.0.1:{http}/-/routes").status_code == 403


def raw(port, text, *, closes=False):
    """The status and the body that a client gets for these bytes, behind which it may close its side."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        if closes:
            connection.shutdown(socket.SHUT_WR)
        answer = HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


def test_odd_calls_get_an_answer_at_once(tmp_path):
    tmp_path.chmod(0o700)
    post = b"POST /at-once HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    with ingress() as (port, _), haproxy(tmp_path, 1, http=[port]) as http, httpx2.Client() as client:
        url = f"http://127.0.0.1:{http}/v1/models"
        answered(client, url)
        # A body that an ingress refuses by its length is not waited for.
        assert raw(http, post + b"content-length: 99999999999\r\n\r\n{")[0] == 200
        # One whose client closes its side at once may count as gone: a refusal, or the answer.
        assert raw(http, post + b"content-length: 1\r\n\r\n{", closes=True)[0] in (200, 400)
        status, body = raw(http, b"FROB / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (status, json.loads(body)["error"]["type"]) == (405, "invalid_request_error")
        flood = b"".join(b"x-%d: 1\r\n" % i for i in range(500))
        for text in (b"\x16\x03\x01\x00", b"GET / HTTP/1.1\r\n" + flood, b"GET /\x00 HTTP/1.1\r\n"):
            assert raw(http, text + b"\r\n\r\n")[0] == 400
        # Serve would answer other bytes than ASCII in these with 500.
        sent = {"x-request-id": b"\xff\xfe", "traceparent": b"\xc3", "x-client-id": b"\xc3"}
        seen = client.get(url, headers=list(sent.items())).json()
        assert not seen.keys() & {"x-request-id", "traceparent"}
        assert "x-client-id" in seen
        assert client.get(url, headers={"x-request-id": "mine-1"}).json()["x-request-id"] == "mine-1"
