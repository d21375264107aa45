"""Bodies that are made to cost time and memory."""

import asyncio
import json
import threading

import pytest
from http_tools import Front
from pydantic import ValidationError
from serving_fakes import write_tokenizer
from test_http import CHAT, scope_of

from cluster.serving.openai import body_route, gate
from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.completion_schema import CompletionRequest
from cluster.serving.openai.messages_schema import MessagesRequest
from cluster.serving.text.tokenizer import Tokenizer

MANY = 20_000
BAD_BODIES = [
    (ChatRequest, {"messages": [{}] * MANY}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "x"}] * MANY}]}),
    (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    (ChatRequest, {"messages": [], "tools": [{}] * MANY, "documents": [1] * MANY}),
    (ChatRequest, {"messages": [], "stop": [1] * MANY, "logit_bias": {str(i): "" for i in range(MANY)}}),
    (ChatRequest, {"messages": [], **{f"k{i}": 1 for i in range(MANY)}}),
    (CompletionRequest, {"prompt": [{}] * MANY, "stop_token_ids": ["a"] * MANY, "guided_choice": [1] * MANY}),
    (CompletionRequest, {"prompt": [[1]] * MANY + [["a"]]}),
    (MessagesRequest, {"model": "a", "max_tokens": 1, "messages": [{"role": "user", "content": [{}] * MANY}]}),
    (MessagesRequest, {"model": "a", "max_tokens": 1, "messages": [], "system": [{}] * MANY, "tools": [{}] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), BAD_BODIES)
def test_of_many_faults_in_a_body_few_are_looked_at(model, body):
    """An error of each made 11 GB of a body of 8 MB, and held the event loop for 46 s."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 8


def test_slow_bodies_of_many_clients_do_not_fill_the_memory(tokenizer, monkeypatch):
    """Each of them stays below the limit of one; together they may be as much as two of the largest here."""
    monkeypatch.setattr(gate, "MAX_OPEN_BODIES", 2)

    async def run():
        front, statuses, go_on = Front(tokenizer, max_request_bytes=1000), [], asyncio.Event()

        async def ask():
            pieces = [b'{"messages"' + b" " * 700, b":[]}"]

            async def receive():
                if len(pieces) < 2:
                    await go_on.wait()
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            await front.app(scope_of(CHAT), receive, send)

        asked = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.wait(asked[2:], timeout=10)
        assert statuses == [429] * 3
        go_on.set()
        await asyncio.wait(asked, timeout=10)
        assert statuses == [429] * 3 + [400] * 2
        await asyncio.wait_for(ask(), 10)
        assert statuses[-1] == 400

    asyncio.run(run())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_call_of_very_many_prompts_is_refused_before_any_of_them_is_looked_at(tokenizer):
    front = Front(tokenizer, max_request_bytes=1 << 20)
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/pooling", "input")):
        refused = asyncio.run(front.post(path, {field: [[1]] * 200_000}))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert f"{field} has 200000 prompts" in refused.json()["error"]["message"]
    assert front.backend.requests == []


def test_a_form_that_takes_long_to_refuse_holds_up_no_other_request(tokenizer):
    """Here 0.4 s and 82 MB. The event loop goes on meanwhile, and so does a whole call."""
    terms = "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)), 'A40: "x"'])

    async def run():
        front, answered = Front(tokenizer), []

        async def others(refusal):
            while not refusal.done():
                answered.append(await front.post("/v1/completions", {"prompt": "a", "max_tokens": 1}))

        body = {"prompt": "a", "structured_outputs": {"grammar": terms}}
        refusal = asyncio.ensure_future(front.post("/v1/completions", body))
        await others(refusal)
        assert (refusal.result().status_code, "too big" in refusal.result().text) == (400, True)
        assert {answer.status_code for answer in answered} == {200}
        assert len(answered) > 5

    asyncio.run(run())


def post_text(front, path, text):
    async def run():
        async with front.client() as client:
            return await client.post(path, content=text, headers={"content-type": "application/json"})

    return asyncio.run(run())


CALLS = {"/v1/completions": {"prompt": "a"}, CHAT: {"messages": [{"role": "user", "content": "a"}]}}
FAULTS = ["7", '{"a"', "[" * 9000, "{}", '{"prompt": {}}', '{"strange": 1}', '{"messages": [{"role": 1}]}']


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("text", [None, *FAULTS], ids=lambda text: str(text)[:20])
def test_a_large_body_is_answered_as_a_small_one(tokenizer, path, text):
    """It is the same body, with white space behind it."""
    text = json.dumps(CALLS[path] | {"max_tokens": 1}) if text is None else text
    small, large = (
        post_text(Front(tokenizer, max_request_bytes=1 << 20), path, text + end)
        for end in ("", " " * body_route.LARGE_BYTES)
    )
    assert large.status_code == small.status_code
    if small.status_code != 200:
        assert large.json() == small.json()
    else:
        assert large.json()["choices"] == small.json()["choices"]


TURN = {"role": "user", "content": "a"}
IMAGE = {"role": "user", "content": [{"type": "input_image"}]}
PLACES = [
    ("completions", {"prompt": 5}, "prompt: Input should be a valid string"),
    ("completions", {"prompt": [[1], ["a"]]}, "prompt.1.0: Input should be a valid integer"),
    ("completions", {"prompt": "a", "stream_options": {"a.b": 1}}, "unrecognized request argument: stream_options.a.b"),
    ("chat/completions", {}, "messages: Field required"),
    ("chat/completions", {"messages": [{**TURN, "content": 5}]}, "messages.0.content: Input should be a valid string"),
    ("chat/completions", {"messages": [TURN], "stop": 5}, "stop: Input should be a valid string"),
    ("chat/completions", {"messages": [TURN], "tools": [{"type": "function"}]}, "tools.0.function: Field required"),
    ("chat/completions", {"messages": [TURN], "tool_choice": {"type": "x"}}, "tool_choice.type: Input should be 'f"),
    ("chat/completions", {"messages": [TURN], "response_format": {"type": "json_schema"}},
     "response_format.json_schema: Field required"),
    ("chat/completions", {"messages": [TURN], "response_format": {"type": "x"}},
     "response_format: type 'x' is not known here, only 'text', 'json_object', 'json_schema'"),
    ("chat/completions", {"messages": [TURN], "response_format": {}}, "response_format: its type is missing"),
    ("responses", {"input": [{"type": "x"}]}, "input.0: type 'x' is not known here, only 'message', 'function_call'"),
    ("responses", {"input": [IMAGE]}, "input.0.content.0: type 'input_image' is not known here, only 'input_text'"),
]  # fmt: skip


async def send(front, path, text):
    async with front.client() as client:
        return await client.post(path, content=text, headers={"content-type": "application/json"})


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("path", "body", "words"), PLACES)
def test_a_fault_is_named_by_the_bodys_own_keys(tokenizer, monkeypatch, path, body, words, large):
    """As its client wrote them: without the types that were tried for a value, whose names are our own."""
    monkeypatch.setattr(body_route, "LARGE_BYTES", 1 if large else 1 << 20)
    answer = asyncio.run(send(Front(tokenizer), f"/v1/{path}", json.dumps(body)))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(words)
    assert error["param"] == words.removeprefix("unrecognized request argument: ").partition(":")[0].partition(".")[0]


@pytest.mark.parametrize("body", ["{", "[" * 100_000 + "]" * 100_000])
def test_json_that_is_broken_or_too_deep_is_named_so(tokenizer, body):
    answer = asyncio.run(send(Front(tokenizer, max_request_bytes=1 << 20), "/v1/completions", body))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "the body is no JSON that can be read: it is broken, or nested too deeply"
    )


def test_a_stream_goes_on_while_a_large_body_is_read(tokenizer, monkeypatch):
    """The body is read once the stream has ended: on the event loop that would be never."""
    ended, read, in_time = threading.Event(), body_route.read_body, []

    def late(body, field):
        in_time.append(ended.wait(30))
        return read(body, field)

    monkeypatch.setattr(body_route, "read_body", late)

    async def run():
        front = Front(tokenizer, max_request_bytes=1 << 20)
        async with front.client() as client:
            text = json.dumps({"prompt": "a", "max_tokens": 1}) + " " * body_route.LARGE_BYTES
            headers = {"content-type": "application/json"}
            large = asyncio.create_task(client.post("/v1/completions", content=text, headers=headers))
            await asyncio.sleep(0)
            stream = await front.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")
            ended.set()
            assert (await large).status_code == 200

    asyncio.run(run())
    assert in_time == [True]


def test_of_too_many_items_none_is_looked_at(tokenizer):
    turns = [{"role": "user", "content": "a"}] * 9000
    front = Front(tokenizer, max_request_bytes=1 << 20)
    for path, body, words in (
        ("/v1/responses", {"input": turns}, "input has 9000 items, at most 8192 are allowed"),
        (
            "/v1/messages",
            {"messages": turns, "max_tokens": 1, "model": "tiny"},
            "messages has 9000 messages, 1 to 2048",
        ),
    ):
        refused = asyncio.run(front.post(path, body))
        assert (refused.status_code, words in refused.json()["error"]["message"]) == (400, True)
