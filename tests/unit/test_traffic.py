"""The figures that `moe-cluster bench serve` and `bench transport` compute from their times."""

import http.server
import json
import threading

import pytest

from cluster.bench.traffic import StreamTiming, summarize
from cluster.cli import main
from cluster.client.http_streams import HttpStreams
from cluster.errors import ClusterError, Overloaded, Unavailable
from cluster.types import SamplingParams


def test_times_are_summed_up_by_percentile():
    """Two answers. The first has pieces of 1, 2 and 1 tokens at 0.1, 0.2 and 0.4 s: gaps of 0.1 and 0.2 s, 0.3 s for 3
    tokens after its first. The second has tokens at 0.3 and 0.4 s. Six tokens in 2 s."""
    result = summarize([StreamTiming(arrivals_s=(0.1, 0.2, 0.2, 0.4)), StreamTiming(arrivals_s=(0.3, 0.4))], took_s=2.0)
    assert (result.requests, result.failed, result.tokens_per_s) == (2, 0, 3.0)
    assert result.first_token_ms[0] == pytest.approx(200)
    assert result.gap_ms[0] == pytest.approx(100)
    assert result.gap_ms[2] == pytest.approx(100 + 0.98 * 100)
    assert result.per_token_ms == pytest.approx((100, 100, 100))


def test_a_failed_answer_counts_as_failed_and_in_no_time():
    result = summarize([StreamTiming(arrivals_s=(9.0,), error="gone"), StreamTiming(arrivals_s=(0.5,))], took_s=1.0)
    assert (result.requests, result.failed, result.errors) == (2, 1, ("gone",))
    assert result.first_token_ms == pytest.approx((500, 500, 500))
    assert result.tokens_per_s == 1.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--requests", "0"], "--requests is 0"),
        (["serve", "--rate", "0"], "--rate is 0"),
        (["serve", "--http", "ftp://a"], "--http is 'ftp://a'"),
        (["transport", "--repeat", "1"], "--repeat at least"),
        (["throughput", "--compare", "vllm"], "--vllm-python"),
        (["throughput", "--compare", "vllm", "--vllm-python", "/bin/false"], "cannot import vllm"),
    ],
)
def test_arguments_that_cannot_be_carried_out_are_refused_at_once(arguments, named, capsys):
    assert main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err


class Server(http.server.BaseHTTPRequestHandler):
    """Answers a prompt by its first token: 0 gives pieces of 2, 0 and 1 tokens; 1 is busy, 2 a refusal, 3 fails half
    way, 4 ends without its end."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.connections.add(self.client_address)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        kind = body["prompt"][0]
        if kind in (1, 2):
            self.answer(429 if kind == 1 else 400, b'{"error": {"message": "no"}}', {"retry-after": "7"})
            return
        events = [{"choices": [{"text": "", "logprobs": None, "token_ids": ids}]} for ids in ([5, 6], [], [7])]
        lines = ["data: " + json.dumps(event) for event in events]
        lines.append({3: 'data: {"error": {"message": "it broke"}}', 4: ""}.get(kind, "data: [DONE]"))
        self.answer(200, "\n\n".join(lines).encode() + b"\n\n", {})

    def answer(self, status, raw, headers):
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(raw))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.bodies, server.connections = True, [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_http_streams_count_tokens_and_use_a_connection_again(server):
    streams = HttpStreams(f"127.0.0.1:{server.server_port}")
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, seed=4)
    assert [[len(piece.token_ids) for piece in streams.stream([0, 8], params)] for _ in range(3)] == [[2, 0, 1]] * 3
    assert len(server.connections) == 1
    asked = {"prompt": [0, 8], "stream": True, "return_token_ids": True}
    assert server.bodies[0] == asked | {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "seed": 4}


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (1, Overloaded, "no"),
        (2, ClusterError, "HTTP 400"),
        (3, ClusterError, "it broke"),
        (4, Unavailable, "without"),
    ],
)
def test_an_answer_that_is_none_is_an_error(server, kind, error, words):
    with pytest.raises(error, match=words):
        list(HttpStreams(f"http://127.0.0.1:{server.server_port}").stream([kind], SamplingParams()))
