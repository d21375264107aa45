"""The served application over HTTP, through HAProxy, with OpenAI's own client; its answers are those of gRPC."""

import json
import socket
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest
from served_tools import GREEDY, MESSAGES, samples, scrape

from cluster import cli
from cluster.client.grpc_client import Client
from cluster.errors import ClusterError
from cluster.pb.moecluster.v1 import inference_pb2 as pb

pytestmark = pytest.mark.ray


def test_a_chat_has_the_answer_that_grpc_gives(client, expected):
    answer = client.chat.completions.create(model="demo-moe", messages=MESSAGES, max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.usage.prompt_tokens, 12)


def test_a_stream_brings_the_same_piece_by_piece(client, expected):
    stream = client.chat.completions.create(
        model="demo-moe",
        messages=MESSAGES,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_the_live_page_sees_the_experts_of_an_answer(served, client):
    """3 tokens of the prompt and 7 of the answer, the last being nobody's input, are computed by 8 experts each in each
    of 4 layers."""
    with urlopen(f"{served.http_url}/", timeout=30) as page:
        assert "default-src 'none'" in page.headers["content-security-policy"]
    asked, passed = False, np.zeros((4, 64), dtype=int)
    with urlopen(f"{served.http_url}/cluster/live", timeout=60) as stream:
        for name, value in live_events(stream):
            if name == "cluster":
                assert [shard["state"] for shard in value["shards"]] == ["up", "up"]
            if name != "beat":
                continue
            if not asked:
                client.completions.create(model="demo-moe", prompt=[1, 2, 3], max_tokens=8, **GREEDY)
                asked = True
            passed += value["tokens"] or 0
            if passed.sum() >= 4 * 80:
                break
    assert passed.sum(axis=1).tolist() == [80] * 4


def live_events(stream):
    name = b""
    for line in stream:
        field, _, value = line.strip().partition(b": ")
        if field == b"event":
            name = value
        elif field == b"data":
            yield name.decode(), json.loads(value)


def test_a_client_that_closes_its_sending_side_is_gone_and_no_other(client, served):
    """Its stream ends before the answer does; calls after it find all as before."""
    url = urlsplit(served.http_url)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1000, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        found = b""
        while found.count(b"data: ") < 3:
            found += connection.recv(4096)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            found += piece
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"[DONE]" not in found
    answer = client.completions.create(model="demo-moe", prompt=[1, 2, 3], max_tokens=4, **GREEDY)
    assert answer.usage.completion_tokens == 4


def test_completions_of_several_prompts(client, served):
    answer = client.completions.create(
        model="demo-moe", prompt=[[1, 2, 3], [4, 5]], n=2, max_tokens=4, logprobs=1, **GREEDY
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices)


def test_an_echo_has_the_log_probabilities_that_grpc_gives(client, stub):
    """And a prompt's likeliest tokens are those that an answer's first token has after it."""
    prompt = list(range(10, 40))
    score = stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=prompt)))
    ask = {"model": "demo-moe", "max_tokens": 1, "logprobs": 3, **GREEDY}
    [echoed] = client.completions.create(prompt=prompt, echo=True, **ask).choices
    [cut] = client.completions.create(prompt=prompt[:20], **ask).choices
    assert echoed.logprobs.token_logprobs[1:30] == pytest.approx(list(score.logprobs), abs=1e-4)
    top = {
        token: value
        for token, value in echoed.logprobs.top_logprobs[20].items()
        if token in cut.logprobs.top_logprobs[0]
    }
    assert top == pytest.approx(cut.logprobs.top_logprobs[0], abs=1e-4)


def test_refusals_are_openais_errors(client, served):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature is 200"):
        client.chat.completions.create(model="demo-moe", messages=MESSAGES, temperature=200)
    for path, status in (("/-/routes", 403), ("/v1/nothing", 404)):
        with pytest.raises(HTTPError) as refused:
            urlopen(served.http_url + path, timeout=60)
        assert refused.value.code == status
        assert "message" in json.load(refused.value)["error"]


def test_questions_about_the_server(client, served):
    assert [model.id for model in client.models.list()] == ["demo-moe", "demo", "Qwen/Qwen1.5-MoE-A2.7B-Chat"]
    for path in ("/health", "/ready", "/version", "/-/healthz"):
        with urlopen(served.http_url + path, timeout=60) as answer:
            assert answer.status == 200
    with urlopen(served.http_url + "/metrics", timeout=60) as answer:
        assert "moecluster_requests_total" in answer.read().decode()


def test_a_client_of_the_other_port_is_told_so(served):
    with Client(served.http_url.removeprefix("http://")) as client, pytest.raises(ClusterError, match="speaks HTTP"):
        client.model_info()


def test_a_client_that_leaves_frees_its_place(served):
    """A stream of which one event is read: the engine ends it long before it has all its tokens."""
    before = scrape(served)["moecluster_generated_tokens_total"]
    body = {"messages": MESSAGES, "max_tokens": 900, "stream": True, "ignore_eos": True}
    request = Request(
        f"{served.http_url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urlopen(request, timeout=30) as answer:
        assert answer.readline().startswith(b"data: ")
    assert scrape(served)["moecluster_generated_tokens_total"] - before < 600


def test_a_batch_over_http_has_the_same_answers(served, expected, tmp_path):
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body | {"max_tokens": 12 + i}}
        for i in range(30)
    ]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--address", served.http_url]) == 0
    found = {one["custom_id"]: one for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert len(found) == 30
    assert found["r0"]["response"]["body"]["choices"][0]["message"]["content"] == expected.text
    assert found["r29"]["response"]["body"]["usage"]["completion_tokens"] == 41


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_the_answers_to_one_prompt_share_its_cache(served, client, path):
    """Two attention replicas, six answers: the prompt is computed once but for its last tokens, those of the block that
    each answer computes itself (16 at most)."""
    before = _prefill_tokens(served)
    ask = {"model": "demo-moe", "n": 6, "max_tokens": 2, "temperature": 1.0, "seed": 3}
    if path == "completions":
        answer = client.completions.create(prompt=[7 + i % 200 for i in range(300)], **ask)
    else:
        text = "Which experts answered, and which shard holds them? " * 20
        answer = client.chat.completions.create(messages=[{"role": "user", "content": text}], **ask)
    assert len(answer.choices) == 6
    num_prompt_tokens = answer.usage.prompt_tokens
    assert num_prompt_tokens > 200
    computed = _prefill_tokens(served) - before
    assert num_prompt_tokens <= computed <= num_prompt_tokens + 5 * 16


def _prefill_tokens(served):
    name = "moecluster_engine_step_tokens_total"
    return sum(s.value for s in samples(served) if s.name == name and s.labels["phase"] == "prefill")


def test_a_batch_over_http_takes_every_kind_of_request(served, stub, tmp_path):
    """Vectors are those that gRPC gives; calls and forms are by their schemas; a refusal harms no other line."""
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    chat = {"messages": MESSAGES, "max_tokens": 200, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    bodies = {
        "vector": ("embeddings", {"input": "hello"}),
        "called": (
            "chat/completions",
            {**chat, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False},
        ),
        "schema": ("chat/completions", {**chat, "response_format": form}),
        "choice": ("completions", {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}),
        "refused": ("embeddings", {"input": "x", "encoding_format": "hex"}),
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": f"/v1/{path}", "body": body}
        for name, (path, body) in bodies.items()
    ]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--address", served.http_url]) == 1
    found = {one["custom_id"]: one["response"] for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert {name: one["status_code"] for name, one in found.items()} == dict.fromkeys(bodies, 200) | {"refused": 400}
    expected = stub.Embed(pb.EmbedRequest(text="hello"))
    assert found["vector"]["body"]["data"][0]["embedding"] == pytest.approx(list(expected.embedding), abs=1e-5)
    [call] = found["called"]["body"]["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["x"] in (1, 2)
    assert json.loads(found["schema"]["body"]["choices"][0]["message"]["content"])["x"] in (1, 2)
    assert found["choice"]["body"]["choices"][0]["text"] in ("yes", "no")
    assert set(found["refused"]["body"]["error"]) == {"message", "type", "param", "code"}
