"""The HTTP front's surroundings: keys, bodies, errors, questions about the server."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from http_tools import MODEL, Front, events, scope_of
from serving_fakes import EchoBackend, write_tokenizer

from cluster.errors import ShardUnavailable
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.openai import gate
from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.completion_schema import CompletionRequest
from cluster.serving.openai.messages_schema import MessagesRequest
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate
from cluster.version import __version__

CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def test_questions_about_the_server(tokenizer):
    async def run():
        front = Front(tokenizer)
        assert (await front.get("/version")).json() == {"version": __version__}
        assert [(await front.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
        models = (await front.get("/v1/models")).json()
        assert models["data"][0] == (await front.get("/v1/models/tiny")).json()
        assert models["data"][0]["max_model_len"] == 64
        assert (await front.get("/metrics")).text == "moecluster_up 1\n"
        front.service.admission.drain()
        front.health.set(False)
        assert [(await front.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
        draining = await front.post(CHAT, HELLO)
        assert (draining.status_code, error_of(draining)["type"]) == (503, "server_error")

    asyncio.run(run())


def test_a_part_that_is_not_up_makes_it_unhealthy(tokenizer):
    front = Front(tokenizer)
    front.health.set(False)
    assert asyncio.run(front.get("/health")).status_code == 503


def test_without_a_known_key_nothing_but_questions_is_answered(tokenizer, tmp_path):
    key, line = new_key("alice")
    file = tmp_path / "keys"
    file.write_text(line + "\n")
    front = Front(tokenizer, keys=ApiKeys(file, lambda: 0.0))

    async def run():
        stranger = await front.post(CHAT, {"broken": 1})
        assert (stranger.status_code, error_of(stranger)["code"]) == (401, "invalid_api_key")
        assert stranger.headers["www-authenticate"] == "Bearer"
        assert (await front.get("/metrics")).status_code == 401
        assert (await front.get("/v1/models")).status_code == 401
        assert (await front.get("/health")).status_code == 200
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            assert (await front.post(CHAT, HELLO, headers=headers)).status_code == 200
        assert [request.client for request in front.backend.requests] == ["alice", "alice"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "headers", "status", "word"),
    [
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        (b"{}", {}, 415, "missing"),
        (b"{}", {"content-type": "application/json", "content-encoding": "gzip"}, 415, "gzip"),
        (b"{", None, 400, "no JSON"),
        (b'{"model": "\xff"}', None, 400, "no JSON"),
        (b"[" * 5000, None, 400, "no JSON"),
        (b'{"model": ' + b"9" * 6000 + b"}", None, 400, "no JSON"),
        (b"[]", None, 400, ""),
        (b"null", None, 400, ""),
        (b"", None, 400, ""),
        (b" " * 10_001, None, 413, "10000 bytes"),
        (json.dumps({**HELLO, "temperature": "1"}).encode(), None, 400, "temperature"),
        (json.dumps({**HELLO, "n": 0}).encode(), None, 400, "n: "),
        (json.dumps({**HELLO, "frobnicate": 1}).encode(), None, 400, "unrecognized request argument: frobnicate"),
        (json.dumps({**HELLO, "temperature": 1e400}).encode(), None, 400, "temperature"),
        (json.dumps({**HELLO, "temperature": -1}).encode(), None, 400, "temperature is -1"),
        (json.dumps({**HELLO, "messages": []}).encode(), None, 400, "messages has 0"),
        (json.dumps({**HELLO, "messages": [{"role": "pope", "content": ""}]}).encode(), None, 400, "messages.0.role"),
        (json.dumps({**HELLO, "messages": [{"role": "user"}]}).encode(), None, 400, "no content"),
        (json.dumps({**HELLO, "model": "gpt-5"}).encode(), None, 404, "'gpt-5' is not served"),
        (json.dumps({**HELLO, "stream_options": {}}).encode(), None, 400, "set stream"),
        (json.dumps({**HELLO, "max_tokens": 1000}).encode(), None, 400, "max_tokens is 1000"),
        (json.dumps({**HELLO, "messages": [{"role": "user", "content": "\ud800"}]}).encode(), None, 400, "surrogate"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_with_a_reason(tokenizer, body, headers, status, word):
    async def run():
        front = Front(tokenizer)
        kind = {"content-type": "application/json"} if headers is None else headers
        async with front.client() as client:
            response = await client.post(CHAT, content=body, headers=kind)
        assert response.status_code == status
        assert word in error_of(response)["message"]
        assert front.backend.requests == []

    asyncio.run(run())


def test_the_table_of_fields_has_those_of_the_bodies():
    whole = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    page, messages = (whole.partition(f"\n## {title}")[2].partition("\n## ")[0] for title in ("Fields", "Messages"))
    found = re.findall(r"^\| (`.*?`) \|", messages, flags=re.MULTILINE)
    assert {name for names in found for name in re.findall(r"`(\w+)`", names)} == set(MessagesRequest.model_fields)
    rows = re.findall(r"^\| (`.*?`) \| (\w+) \|", page, flags=re.MULTILINE)
    listed = {(name, of) for names, of in rows for name in re.findall(r"`(\w+)`", names)}
    chat, completions = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    named = {"chat": chat - completions, "completions": completions - chat, "both": chat & completions}
    assert listed == {(name, of) for of, names in named.items() for name in names}


def test_paths_and_methods_that_are_not_here(tokenizer):
    async def run():
        front = Front(tokenizer)
        missing, wrong = await front.get("/v1/nothing"), await front.get(CHAT)
        assert [missing.status_code, wrong.status_code] == [404, 405]
        error_of(missing), error_of(wrong)
        async with front.client() as client:  # without a body, too, for which a media type would be asked
            assert (await client.post("/health")).status_code == 405
            assert (await client.put(CHAT)).status_code == 405
            assert (await client.post("/v1/nothing")).status_code == 404
        assert (await front.get("/v1/models/other")).status_code == 404
        assert (await front.get("/docs")).status_code == 404  # its page loads scripts from elsewhere

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_when_to_come_again(tokenizer, stream):
    full = asyncio.run(Front(tokenizer, room=0).post(CHAT, {**HELLO, "stream": stream}))
    assert (full.status_code, error_of(full)["code"]) == (429, "rate_limit_exceeded")
    assert int(full.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_internal_error_tells_nothing_of_the_inside(tokenizer, stream, caplog):
    backend = EchoBackend(script=[RuntimeError("/secret/path")])
    response = asyncio.run(Front(tokenizer, backend).post(CHAT, {**HELLO, "stream": stream}))
    assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
    assert "secret" not in response.text
    assert "/secret/path" in caplog.text


def test_an_error_after_the_first_token_ends_the_stream_and_is_in_it(tokenizer):
    backend = EchoBackend(script=[SequenceUpdate(request_id="a", token_ids=(64,)), ShardUnavailable("a shard is gone")])
    response = asyncio.run(Front(tokenizer, backend).post(CHAT, {**HELLO, "stream": True}))
    assert response.status_code == 200
    *_, content, last = events(response)
    assert content["choices"][0]["delta"] == {"content": "a"}
    assert last["error"]["message"] == "a shard is gone"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(tokenizer, stream):
    async def run():
        front = Front(tokenizer, EchoBackend(hang=True))
        sent = [{"type": "http.request", "body": json.dumps({**HELLO, "n": 2, "stream": stream}).encode()}]

        async def receive():
            if sent:
                return sent.pop()
            await front.backend.reached.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(f"{message} to a client that has left")

        await asyncio.wait_for(front.app(scope_of(CHAT), receive, send), 10)
        assert len(front.backend.closed) == len(front.backend.requests) > 0
        assert front.service.admission.num_running == 0

    asyncio.run(run())


def test_a_client_that_does_not_read_is_given_up_without_a_word_of_error(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(gate, "UNREAD_TIMEOUT_S", 0.01)

    async def run():
        front = Front(tokenizer)
        sent = [{"type": "http.request", "body": json.dumps({**HELLO, "stream": True}).encode()}]

        async def receive():
            if not sent:
                await asyncio.Event().wait()
            return sent.pop()

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(front.app(scope_of(CHAT), receive, send), 10)
        assert len(front.backend.closed) == 1
        assert front.service.admission.num_running == 0

    asyncio.run(run())
    assert caplog.text == ""


def test_a_body_that_does_not_come_is_not_waited_for(tokenizer, monkeypatch):
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.01)

    async def run():
        answers, begun = [], [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive():
            if not begun:
                await asyncio.Event().wait()
            return begun.pop()

        async def send(message):
            answers.append(message)

        await asyncio.wait_for(Front(tokenizer).app(scope_of(CHAT), receive, send), 10)
        assert answers[0]["status"] == 408

    asyncio.run(run())
