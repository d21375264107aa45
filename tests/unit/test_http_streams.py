"""The client of `moe-cluster chaos --http`, and of the bench: what it reads however a stream is cut; no half answer."""

import json
import socket
import ssl
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.client.http_streams import HttpStreams
from cluster.errors import BrokenStream, ClusterError, InvalidRequest, ProtocolError, SetupError, Unavailable
from cluster.serving.openai.sse import error_event
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=2, logprobs=1, stop=("x",)).with_defaults(SAMPLING_DEFAULTS)


def event(text, token_id, logprobs=None, reason=None):
    choice = {"index": 0, "text": text, "token_ids": [token_id], "logprobs": logprobs, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


FIRST, SECOND, DONE = event("é", 7, {"token_logprobs": [-0.5]}), event("b", 8), b"data: [DONE]\n\n"
LAST = event("b", 8, reason="length")


@contextmanager
def server(pieces, status=200, parts=()):
    """Answers with the pieces, each sent by itself; or each call with the next of `parts`. Yields its URL and the
    bodies that came."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(status)
            self.end_headers()
            for piece in parts[len(bodies) - 1] if parts else pieces:
                self.wfile.write(piece)
                self.wfile.flush()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}", bodies
        one.shutdown()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_is_the_same_however_it_is_cut(size):
    whole = FIRST + SECOND + DONE
    with server([whole[at : at + size] for at in range(0, len(whole), size)]) as (url, bodies):
        pieces = list(HttpStreams(url).stream((1, 2), PARAMS))
    assert [(piece.text, piece.token_ids) for piece in pieces] == [("é", (7,)), ("b", (8,))]
    assert [entry.logprob for piece in pieces for entry in piece.logprobs] == [-0.5]
    [body] = bodies
    assert (body["prompt"], body["stop"], body["logprobs"], body["temperature"]) == ([1, 2], ["x"], 1, 0.0)


def test_a_stream_that_breaks_goes_on_where_it_shall():
    """Each stream of this server ends after its first event; the answer ends with the second one."""
    with server([], parts=[[FIRST], [LAST]]) as (url, bodies):
        pieces = list(HttpStreams(url, goes_on=True).stream((1, 2), SamplingParams(max_tokens=2)))
    assert [piece.token_ids for piece in pieces] == [(7,), (8,)]
    first, second = bodies
    assert second == first | {"continue_from": [7]}
    assert first["seed"] is not None


@pytest.mark.parametrize(("code", "num_asked"), [("service_unavailable", 2), (None, 1)])
def test_an_error_in_a_stream_is_waited_for_where_the_server_says_so(code, num_asked):
    """As the server words Unavailable, and an error that would come again."""
    error = Unavailable("gone") if code else InvalidRequest("gone")
    parts = [[FIRST, error_event(error, "r").encode()], [LAST]]
    with server([], parts=parts) as (url, bodies):
        pieces = HttpStreams(url, goes_on=True).stream((1, 2), SamplingParams(max_tokens=2))
        with nullcontext() if code else pytest.raises(ClusterError, match="gone"):
            assert [piece.token_ids for piece in pieces] == [(7,), (8,)]
    assert len(bodies) == num_asked


@pytest.mark.parametrize(
    ("pieces", "status", "kind", "word"),
    [
        ([FIRST], 200, Unavailable, "without"),
        ([FIRST[:-9]], 200, Unavailable, "broke off"),
        ([FIRST, b'data: {"error": {"message": "a shard is gone"}}\n\n'], 200, ClusterError, "a shard is gone"),
        ([b'{"error": {"message": "full"}}'], 429, ClusterError, "429: .*full"),
        ([b"\xff\xfe\n"], 200, ProtocolError, "no events of /v1/completions"),
        ([b'data: {"object": "list"}\n'], 200, ProtocolError, "no events of /v1/completions"),
        ([b'{"error": {"message": "no ingress"}}'], 502, Unavailable, "502: .*no ingress"),
    ],
)
def test_half_an_answer_is_an_error(pieces, status, kind, word):
    with server(pieces, status) as (url, _), pytest.raises(kind, match=word):
        list(HttpStreams(url).stream((1, 2), PARAMS))


def test_nobody_there_and_no_address():
    with pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:1"):
        list(HttpStreams("http://127.0.0.1:1").stream((1,), PARAMS))
    with pytest.raises(SetupError, match="http://HOST:PORT"):
        HttpStreams("ftp://127.0.0.1")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Unavailable, "no host is known for"),
        (UnicodeError("label too long"), SetupError, "is the name of no host"),
        (ssl.SSLCertVerificationError(1, "self-signed"), SetupError, "see --tls-ca"),
        (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), SetupError, "does that server speak it"),
        (ssl.SSLEOFError(8, "EOF"), Unavailable, "hung up"),
        (OSError(113, "No route to host"), Unavailable, "No route to host"),
    ],
)
def test_a_server_that_was_never_reached_is_not_waited_for(monkeypatch, fault, kind, words):
    """Not even by one who goes on with an answer: it would be for two minutes."""
    tries = []

    def connect(self):
        tries.append(self.host)
        raise fault

    monkeypatch.setattr("http.client.HTTPConnection.connect", connect)
    with pytest.raises(kind, match=words) as failure:
        list(HttpStreams("http://models.invalid:1", goes_on=True).stream((1,), PARAMS))
    assert tries == ["models.invalid"]
    assert not isinstance(failure.value, BrokenStream)
    assert "\n" not in str(failure.value)


def test_a_server_without_tls_is_no_broken_stream():
    with server([]) as (url, _), pytest.raises((SetupError, Unavailable)) as failure:
        list(HttpStreams(url.replace("http:", "https:"), goes_on=True).stream((1,), PARAMS))
    assert not isinstance(failure.value, BrokenStream)
