"""The command `batch`: lines, answers, and runs that are killed."""

import asyncio
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from cluster import LLM, SamplingParams, cli
from cluster.batch.app import AppAnswerer
from cluster.batch.ledger import Ledger
from cluster.batch.lines import Fault, count, parse, read
from cluster.batch.run import Pace, Reply, run
from cluster.errors import SetupError, Unavailable


def request(custom_id, prompt="x", **others):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | others


def written(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"{", "invalid_json_line", "no JSON"),
        (b"[" * 100_000, "invalid_json_line", "no JSON"),
        (b"\xff", "invalid_json_line", "UTF-8 at byte 0"),
        (b"[]", "invalid_json_line", "no JSON object"),
        (b"{}", "missing_required_parameter", "custom_id"),
        (b'{"custom_id": 3}', "missing_required_parameter", "custom_id"),
        (json.dumps(request("a", method="GET")).encode(), "invalid_method", "POST"),
        (json.dumps(request("a", url="/v1/files")).encode(), "invalid_url", "/v1/chat/completions"),
        (json.dumps(request("a", url=["x"])).encode(), "invalid_url", "/v1/chat/completions"),
        (json.dumps(request("a", body=None)).encode(), "missing_required_parameter", "body"),
        (json.dumps(request("a", body={"stream": True})).encode(), "invalid_request", "stream"),
    ],
)
def test_a_line_that_is_no_request_has_a_fault(line, code, words):
    found = parse(line, "id")
    assert found.fault.code == code
    assert words in found.fault.message


def test_equal_lines_have_ids_of_their_own_and_moved_lines_keep_theirs(tmp_path):
    first = list(read(written(tmp_path / "a", request("a"), request("b"), "\n", request("a"))))
    assert len({line.id for line in first}) == 3
    assert first[2].fault.code == "duplicate_custom_id"
    assert first[2].fault.message.startswith("line 4: ")
    moved = list(read(written(tmp_path / "b", request("c"), request("b"), request("a"))))
    assert [line.id for line in moved[1:]] == [first[1].id, first[0].id]
    assert count(tmp_path / "a") == 3


class Model:
    """Answers with the prompt; `refusals` come first for each prompt. Notes how many requests are under way."""

    def __init__(self, *refusals):
        self.refusals, self.asked, self.under_way, self.most = refusals, Counter(), 0, 0

    async def answer(self, url, body):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        number = self.asked[body["prompt"]]
        self.asked[body["prompt"]] += 1
        if number < len(self.refusals):
            if isinstance(self.refusals[number], Exception):
                raise self.refusals[number]
            return Reply(self.refusals[number], {})
        return Reply(200, {"id": "x", "text": body["prompt"]}, "x")


async def no_wait(seconds):
    return None


def answered(tmp_path, model, *lines, concurrency=3, patience_s=10.0):
    source, out = written(tmp_path / "in", *lines), tmp_path / "out"
    with Ledger(out) as ledger:
        pace = Pace(concurrency=concurrency, patience_s=patience_s, sleep=no_wait)
        asyncio.run(run(read(source), model, ledger, pace, lambda through: None))
    return answers(out)


def test_a_bad_line_has_an_error_and_harms_no_other(tmp_path):
    model = Model()
    found = answered(tmp_path, model, request("a"), "{\n", request("b"), request("a", prompt="other"))
    by_code = Counter(one["error"] and one["error"]["code"] for one in found)
    assert by_code == {None: 2, "invalid_json_line": 1, "duplicate_custom_id": 1}
    good = {one["custom_id"]: one["response"] for one in found if one["error"] is None}
    assert good["a"] == {"status_code": 200, "request_id": "x", "body": {"id": "x", "text": "x"}}
    assert all(list(one) == ["id", "custom_id", "response", "error"] for one in found)
    assert model.asked["other"] == 0


def test_many_are_under_way_and_never_more_than_allowed(tmp_path):
    model = Model()
    assert len(answered(tmp_path, model, *(request(f"r{i}", f"p{i}") for i in range(50)))) == 50
    assert model.most == 3


def test_a_busy_server_is_asked_again_and_a_refusal_is_an_answer(tmp_path):
    model = Model(429, 503, Unavailable("gone"), 404)
    [found] = answered(tmp_path, model, request("a"))
    assert found["response"]["status_code"] == 404
    assert model.asked["x"] == 4


def test_a_server_that_stays_away_ends_the_run_and_the_next_one_goes_on(tmp_path):
    """The waits double: 0.5, 1 and 2 s are the first ones that reach a patience of 3 s."""
    lines = [request(f"r{i}", f"p{i}") for i in range(5)]
    with pytest.raises(Unavailable, match="gone, for 4 s: the same command goes on"):
        answered(tmp_path, Model(*[Unavailable("gone")] * 100), *lines, patience_s=3.0)
    assert answers(tmp_path / "out") == []
    assert len(answered(tmp_path, Model(), *lines)) == 5


def raising(scope, receive, send):
    raise RuntimeError("a fault")


async def broken(scope, receive, send):
    """As Starlette does it: the error has its answer, and is raised all the same."""
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b'{"error": {"message": "id 7"}}'})
    raise RuntimeError("a fault")


async def halved(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'{"id": "x', "more_body": True})


@pytest.mark.parametrize(("app", "words"), [(raising, "internal error"), (broken, "id 7"), (halved, "internal error")])
def test_an_application_that_fails_gives_a_line_an_error_and_the_next_goes_on(tmp_path, app, words):
    async def some(scope, receive, send):
        if b"bad" in (await receive())["body"]:
            await app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    found = answered(tmp_path, AppAnswerer(some), request("a", "bad"), request("b"), concurrency=1)
    assert [one["response"]["status_code"] for one in found] == [500, 200]
    assert words in found[0]["response"]["body"]["error"]["message"]


def test_a_body_that_is_too_deep_to_be_written_is_an_error_of_its_line(tmp_path):
    """It can be read, but not with so many calls around."""

    class Deep(Model):
        async def answer(self, url, body):
            if body["prompt"] == "deep":
                raise RecursionError
            return await super().answer(url, body)

    found = answered(tmp_path, Deep(), request("a", "deep"), request("b"), concurrency=1)
    assert [one["response"]["status_code"] for one in found] == [400, 200]
    assert "too deep" in found[0]["response"]["body"]["error"]["message"]


def test_half_a_last_line_is_cut_off_and_answered_again(tmp_path):
    lines = [request(f"r{i}", f"p{i}") for i in range(4)]
    whole = answered(tmp_path, Model(), *lines)
    text = (tmp_path / "out").read_text()
    for cut in (1, 30, len(text.splitlines()[-1])):
        (tmp_path / "out").write_text(text[:-cut])
        model = Model()
        found = answered(tmp_path, model, *lines)
        assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, whole))
        assert sum(model.asked.values()) == 1


def test_a_file_of_something_else_and_one_that_is_in_use_are_refused(tmp_path):
    out = written(tmp_path / "out", '{"thesis": 1}\n')
    with pytest.raises(SetupError, match="line 1, is no answer of a batch"):
        Ledger(out)
    assert out.read_text() == '{"thesis": 1}\n'
    with Ledger(tmp_path / "other"), pytest.raises(SetupError, match="another batch"):
        Ledger(tmp_path / "other")


def test_a_fault_is_written_as_an_error(tmp_path):
    with Ledger(tmp_path / "out") as ledger:
        ledger.write("i", None, Fault("code", "half \ud800 a character"))
        assert ledger.num_failed == 1
    [line] = answers(tmp_path / "out")
    assert line["response"] is None
    assert line["error"]["code"] == "code"


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers a completion with its prompt, after a moment."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(0.01)
        self.server.asked[body["prompt"]] += 1
        raw = json.dumps({"id": "cmpl-1", "choices": [{"text": body["prompt"]}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads, server.asked = True, Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_that_is_killed_goes_on_and_nothing_is_lost_or_twice(tmp_path, server):
    """Killed with SIGKILL while answers come; half a line stands at the file's end, as a full disk leaves it."""
    num = 300
    source, out = written(tmp_path / "in", *(request(f"r{i}", f"p{i}") for i in range(num))), tmp_path / "out"
    command = [sys.executable, "-m", "cluster.cli", "batch", str(source), str(out)]
    command += ["--address", f"127.0.0.1:{server.server_port}", "--concurrency", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 <= out.read_bytes().count(b"\n") < num
    with out.open("a") as file:
        file.write('{"id": "batch_req_half')
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = answers(out)
    assert Counter(one["custom_id"] for one in found) == {f"r{i}": 1 for i in range(num)}
    assert all(one["response"]["body"]["choices"][0]["text"] == f"p{one['custom_id'][1:]}" for one in found)
    assert sum(server.asked.values()) <= num + 4  # those under way at the kill are asked again


def test_an_offline_batch_has_the_answers_of_generate(tmp_path, demo_checkpoint, capsys):
    prompts = [f"number {i}" for i in range(6)]
    bad = request("long", body={"prompt": "x", "max_tokens": 10**6})
    unknown = request("unknown", body={"prompt": "x", "model": "other"})
    chat = request(
        "chat", url="/v1/chat/completions", body={"messages": [{"role": "user", "content": "hi"}], "seed": 1}
    )
    chat["body"]["max_tokens"] = 3
    source = written(tmp_path / "in", *(request(p, p) for p in prompts), bad, unknown, chat)
    command = ["batch", str(source), str(tmp_path / "out"), "--model", str(demo_checkpoint)]
    options = ["--dtype", "float32", "--kv-cache-bytes", "8MiB"]
    assert cli.main([*command, *options]) == 1
    found = {one["custom_id"]: one["response"] for one in answers(tmp_path / "out")}
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4))
    assert [found[p]["body"]["choices"][0]["text"] for p in prompts] == [output.text for output in expected]
    assert found["long"]["status_code"] == 400
    assert "max_tokens" in found["long"]["body"]["error"]["message"]
    assert found["unknown"]["status_code"] == 404
    assert found["chat"]["body"]["object"] == "chat.completion"
    assert found["chat"]["body"]["usage"]["completion_tokens"] == 3
    assert "9 requests, 9 of them answered now, 2 without" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "ftp://x"], "HOST:PORT or http://HOST:PORT is needed"),
        (["--address", "x:y"], "--address is 'x:y'"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--patience-s", "nan"], "--patience-s is nan"),
        (["--dtype", "float32"], "--dtype is of an offline model"),
        (["--model", "m", "--address", "a:1"], "one of the two"),
        (["--tls-ca", "/nonexistent"], "/nonexistent cannot be used for TLS"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, tmp_path, capsys):
    source = written(tmp_path / "in", request("a"))
    assert cli.main(["batch", str(source), str(tmp_path / "out"), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_input_and_output_are_two_files(tmp_path, capsys):
    source = written(tmp_path / "in", request("a"))
    os.link(source, tmp_path / "same")
    assert cli.main(["batch", str(source), str(tmp_path / "same")]) == 2
    assert "is both input and output" in capsys.readouterr().err


def test_no_server_is_one_line_and_exit_code_1(tmp_path, capsys):
    source = written(tmp_path / "in", request("a"))
    assert cli.main(["batch", str(source), str(tmp_path / "out"), "--address", "127.0.0.1:1", "--patience-s", "0"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("moe-cluster: no answer from http://127.0.0.1:1: Connection refused, for ")
