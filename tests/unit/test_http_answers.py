"""Chats and completions over HTTP, on a backend that answers each prompt with its own tokens, then ends."""

import asyncio
import json
import math
from dataclasses import replace

import pytest
from http_tools import MODEL, Front, events
from serving_fakes import HELLO, IM_END, EchoBackend, byte_ids, write_tokenizer

from cluster.outcome import Numbers
from cluster.serving.openai import answer_size
from cluster.serving.openai.several import AT_A_TIME
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import Logprobs, SequenceUpdate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
A, B, C = byte_ids("abc")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def answer(front, path, **body):
    response = asyncio.run(front.post(path, {"model": MODEL, **body}))
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


def refusal(front, path, **body):
    response = asyncio.run(front.post(path, {"model": MODEL, **body}))
    assert response.status_code == 400
    return response.json()["error"]


def test_a_chat(tokenizer):
    """The prompt is <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n: its special tokens have no text."""
    front = Front(tokenizer)
    made = answer(front, CHAT, messages=MESSAGES, max_completion_tokens=40, top_k=-1, stop=["zzz"], seed=3)
    [request] = front.backend.requests
    assert made == {
        "id": f"chatcmpl-{'generated-1'}",
        "object": "chat.completion",
        "created": 1234,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "user\nhello\nassistant\n", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(request.prompt_token_ids) + 1,
            "total_tokens": 2 * len(request.prompt_token_ids) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert (request.params.max_tokens, request.params.top_k, request.params.seed) == (40, 0, 3)


def test_a_chat_as_a_stream(tokenizer):
    chunks = answer(
        Front(tokenizer), CHAT, messages=MESSAGES, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    assert chunks[-1] == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-2]] == [
        {"role": "assistant", "content": ""}, {"content": "u"}, {"content": "s"}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]] == [None, None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert (chunks[-2]["choices"], chunks[-2]["usage"]["completion_tokens"]) == ([], 3)


def test_choices_of_a_chat_have_seeds_of_their_own_and_one_prompt(tokenizer):
    front = Front(tokenizer)
    made = answer(front, CHAT, messages=MESSAGES, n=3, seed=7, max_tokens=2)
    assert [request.params.seed for request in front.backend.requests] == [7, 8, 9]
    assert len({request.prompt_token_ids for request in front.backend.requests}) == 1
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2]
    assert made["usage"]["prompt_tokens"] == len(front.backend.requests[0].prompt_token_ids)
    assert made["usage"]["completion_tokens"] == 6


def test_cached_tokens_are_those_of_each_prompt_once(tokenizer):
    """Of prompts of 3 and 2 tokens the replicas had 2 and 9, of which 2 are the prompt's; their second answers had all.
    A replay (40) changes nothing, since the first token had come."""
    backend = CachingBackend({(1, 2, 3): [2, 3], (5, 6): [9, 2]})
    made = answer(Front(tokenizer, backend), COMPLETIONS, prompt=[[1, 2, 3], [5, 6]], n=2, max_tokens=2)
    assert made["usage"]["prompt_tokens"] == 5
    assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


class CachingBackend(EchoBackend):
    """cached: of each prompt, the tokens that its answers find, one after another."""

    def __init__(self, cached):
        super().__init__()
        self.cached = cached

    async def generate(self, request):
        cached = self.cached[request.prompt_token_ids].pop(0)
        async for update in super().generate(request):
            yield replace(update, cached_tokens=cached)
            cached = 40


def test_log_probabilities_of_a_chat(tokenizer):
    """A token's log-probability is minus its id; a special token shows its text here, as it is a token."""
    made = answer(Front(tokenizer), CHAT, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=1)
    first, second = made["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], bytes(first["bytes"])) == ("<|im_start|>", -260, b"<|im_start|>")
    assert (second["token"], second["top_logprobs"][0]["token"]) == ("u", "u")


def test_tools_a_system_turn_and_parts_reach_the_template(tmp_path):
    """This template writes what it gets."""
    template = "{{ tools | length if tools else 0 }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    front = Front(Tokenizer(write_tokenizer(tmp_path / "t", chat_template=template)))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    assert answer(front, CHAT, messages=turns, tools=[tool])["choices"][0]["message"]["content"] == "1sxua\nb"
    assert answer(front, CHAT, messages=turns, tools=[tool], tool_choice="none")["choices"][0]["message"][
        "content"
    ].startswith("0")
    refused = refusal(front, CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert "type" in refused["message"]


def test_completions_of_texts_and_of_token_ids(tokenizer):
    front = Front(tokenizer)
    made = answer(front, COMPLETIONS, prompt=["ab", "hello"], max_tokens=8, return_token_ids=True)
    assert [choice["text"] for choice in made["choices"]] == ["ab", "hello"]
    assert made["choices"][1]["token_ids"] == [HELLO, IM_END]
    assert made["choices"][1]["prompt_token_ids"] == [HELLO]
    counted = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert made["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer(front, COMPLETIONS, prompt=[A, B])["choices"][0]["text"] == "ab"
    assert [c["text"] for c in answer(front, COMPLETIONS, prompt=[[A], [B]])["choices"]] == ["a", "b"]
    four = answer(front, COMPLETIONS, prompt=["a", "b"], n=2)["choices"]
    assert [(choice["index"], choice["text"]) for choice in four] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert front.backend.requests[-1].params.max_tokens == 16  # OpenAI's default
    assert "prompts" in refusal(front, COMPLETIONS, prompt=[])["message"]


def test_a_completion_as_a_stream_with_log_probabilities_and_echo(tokenizer):
    front = Front(tokenizer)
    *pieces, done = answer(front, COMPLETIONS, prompt="ab", max_tokens=2, stream=True, echo=True)
    assert ("".join(piece["choices"][0]["text"] for piece in pieces), done) == ("abab", "[DONE]")
    *pieces, _ = answer(front, COMPLETIONS, prompt="ab", max_tokens=2, stream=True, logprobs=1)
    shown = [piece["choices"][0]["logprobs"] for piece in pieces]
    assert [one["tokens"] for one in shown] == [["a"], ["b"]]
    assert [one["text_offset"] for one in shown] == [[0], [1]]
    assert shown[1]["top_logprobs"] == [{"b": -float(B)}]


def test_a_streams_offsets_count_the_text_that_a_stop_string_holds_back(tokenizer):
    """In "abcc" each token has one character; "ab" is not sent before "c", which shows that "abx" does not come."""
    asked = {"prompt": "abcc", "max_tokens": 4, "stop": "abx", "logprobs": 0, "stream": True}
    for echo, backend in ((False, EchoBackend()), (True, Scorer())):
        *pieces, _ = answer(Front(tokenizer, backend), COMPLETIONS, echo=echo, **asked)
        choices = [piece["choices"][0] for piece in pieces]
        assert "".join(one["text"] for one in choices) == ("abccabcc" if echo else "abcc")
        assert len(choices) > 2
        offsets = [offset for one in choices for offset in one["logprobs"]["text_offset"]]
        assert offsets == list(range(8 if echo else 4))


def test_the_best_of_several_is_that_with_the_highest_mean(tokenizer):
    """Two candidates: means -2 (of -1 and -3) and -1.5 (of one token)."""

    class Backend(EchoBackend):
        async def generate(self, request):
            self.requests.append(request)
            first = request.params.seed == 5
            ids, values = ((A, B), (-1.0, -3.0)) if first else ((C,), (-1.5,))
            logprobs = tuple(Logprobs(i, v) for i, v in zip(ids, values, strict=True))
            yield SequenceUpdate(
                request_id=request.request_id, token_ids=ids, logprobs=logprobs, finish_reason="length"
            )

    made = answer(Front(tokenizer, Backend()), COMPLETIONS, prompt="x", best_of=2, n=1, seed=5, max_tokens=2)
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in made["choices"]] == [(0, "c", None)]
    assert made["usage"]["completion_tokens"] == 3
    assert "at least n" in refusal(Front(tokenizer), COMPLETIONS, prompt="x", best_of=1, n=2)["message"]
    assert "stream" in refusal(Front(tokenizer), COMPLETIONS, prompt="x", best_of=2, stream=True)["message"]


class Scorer(EchoBackend):
    """Gives each prompt token after the first -0.5 and rank 2, behind `c` with -0.25."""

    async def generate(self, request):
        if request.wants == "tokens":
            async for update in super().generate(request):
                yield update
            return
        import numpy as np

        width = request.params.logprobs
        rows = [[-0.5, 2, C, *[B] * (width - 1), -0.25, *[-0.5] * (width - 1)]] * (len(request.prompt_token_ids) - 1)
        numbers = Numbers.of(np.array(rows, dtype=np.float32).reshape(-1, 2 + 2 * width))
        yield SequenceUpdate(request_id=request.request_id, finish_reason="stop", numbers=numbers)


def test_an_echo_has_the_prompts_log_probabilities(tokenizer):
    """As evaluation harnesses ask: is each prompt token the likeliest?"""
    made = answer(Front(tokenizer, Scorer()), COMPLETIONS, prompt="ab", max_tokens=0, echo=True, logprobs=1)
    [choice] = made["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"c": -0.25, "b": -0.5}],
        "text_offset": [0, 1],
    }
    counted = {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    assert made["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 0}}
    assert "echo" in refusal(Front(tokenizer), COMPLETIONS, prompt="ab", max_tokens=0)["message"]
    *_, last, _ = answer(
        Front(tokenizer), COMPLETIONS, prompt="ab", max_tokens=0, echo=True, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )  # fmt: skip
    assert last["usage"] == made["usage"]


@pytest.mark.parametrize(("path", "prompt"), [(COMPLETIONS, {"prompt": "ab"}), (CHAT, {"messages": MESSAGES})])
def test_prompt_logprobs(tokenizer, path, prompt):
    made = answer(Front(tokenizer, Scorer()), path, prompt_logprobs=1, max_tokens=1, **prompt)
    shown = (made if path == CHAT else made["choices"][0])["prompt_logprobs"]
    assert shown[0] is None
    if path == COMPLETIONS:
        assert shown[1] == {
            str(B): {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
            str(C): {"logprob": -0.25, "rank": 1, "decoded_token": "c"},
        }
    assert "stream" in refusal(Front(tokenizer), path, prompt_logprobs=1, stream=True, **prompt)["message"]


def test_many_prompts_are_scored_a_few_at_a_time_and_answered_in_their_order(tokenizer):
    class Counting(Scorer):
        running = most = 0

        async def generate(self, request):
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                for _ in range(3 + request.prompt_token_ids[0] % 5):
                    await asyncio.sleep(0)
                async for update in super().generate(request):
                    yield update
            finally:
                self.running -= 1

    backend, prompts = Counting(), [[first, B] for first in range(40)]
    made = answer(
        Front(tokenizer, backend), COMPLETIONS, prompt=prompts, max_tokens=0, echo=True, logprobs=0,
        return_token_ids=True,
    )  # fmt: skip
    assert [choice["prompt_token_ids"] for choice in made["choices"]] == prompts
    assert [choice["logprobs"]["token_logprobs"] for choice in made["choices"]] == [[None, -0.5]] * 40
    assert backend.most == AT_A_TIME


DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}),
        ("documents", {"documents": [DEEP]}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"a": DEEP}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"tools": []}}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 70}], "n": 2}),
        ("max_completion_tokens", {"max_completion_tokens": 70}),
        ("max_completion_tokens", {"max_completion_tokens": 0, "max_tokens": 5}),
        ("max_tokens", {"max_tokens": 70}),
        ("guided_regex", {"response_format": {"type": "text"}, "guided_regex": "("}),
        ("guided_regex", {"structured_outputs": {"regex": "a"}, "guided_regex": "b"}),
        ("guided_json", {"guided_json": "{", "tools": [TOOL], "tool_choice": "required"}),
        ("structured_outputs", {"structured_outputs": {"a": 1}, "tools": [TOOL], "tool_choice": "required"}),
    ],
)
def test_a_fault_of_a_chat_has_the_fields_name(tokenizer, param, body):
    refused = refusal(Front(tokenizer), CHAT, **{"messages": MESSAGES, **body})
    assert refused["param"] == param
    assert param.split("_")[0] in refused["message"] or param == "messages"


def test_a_prompts_numbers_that_are_too_many_are_refused_by_the_field_that_asks_for_them(tokenizer, monkeypatch):
    monkeypatch.setattr(answer_size, "MAX_ANSWER_BYTES", answer_size.LOGPROB_BYTES)
    refused = refusal(Front(tokenizer, Scorer()), COMPLETIONS, prompt="ab", max_tokens=0, echo=True, logprobs=2)
    assert (refused["param"], refused["message"].startswith("logprobs: ")) == ("logprobs", True)


@pytest.mark.parametrize(("field", "given", "taken"), [("seed", -1, 2**63 - 1), ("top_p", 0, 1e-9)])
def test_the_ends_of_openais_ranges_are_taken(tokenizer, field, given, taken):
    front = Front(tokenizer)
    answer(front, CHAT, messages=MESSAGES, max_tokens=1, **{field: given})
    assert getattr(front.backend.requests[0].params, field) == taken
    assert refusal(front, CHAT, messages=MESSAGES, seed=2**63)["param"] == "seed"


def test_minus_infinity_is_a_number_in_json(tokenizer):
    backend = EchoBackend(
        script=[
            SequenceUpdate(request_id="a", token_ids=(A,), logprobs=(Logprobs(A, -math.inf),), finish_reason="stop")
        ]
    )
    made = answer(Front(tokenizer, backend), COMPLETIONS, prompt="a", logprobs=0)
    assert made["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_a_logit_bias_reaches_the_engine_and_odd_ones_are_refused(tokenizer):
    front = Front(tokenizer, max_request_bytes=100_000)
    answer(front, COMPLETIONS, prompt="a", logit_bias={"7": -100, "3": 1.5})
    assert front.backend.requests[0].params.logit_bias == ((3, 1.5), (7, -100.0))
    for bias in ({"x": 1}, {"7": 101}, {"300": 1}, {"-1": 1}, {"9" * 5000: 1}, {str(i): 1 for i in range(2000)}):
        refused = refusal(front, COMPLETIONS, prompt="a", logit_bias=bias)
        assert (refused["param"], len(refused["message"]) < 200) == ("logit_bias", True)


@pytest.mark.parametrize(("num_tokens", "num_before"), [(40, 1), (8, 3)])
def test_choices_wait_for_the_first_ones_long_prompt_and_find_it_in_the_cache(tokenizer, num_tokens, num_before):
    seen = []

    class Backend(EchoBackend):
        async def generate(self, request):
            self.requests.append(request)
            await asyncio.sleep(0.01)  # computes the prompt
            seen.append(len(self.requests))
            yield SequenceUpdate(request_id=request.request_id, token_ids=(A,), finish_reason="length")

    made = answer(Front(tokenizer, Backend()), COMPLETIONS, prompt=[A] * num_tokens, n=3, max_tokens=1)
    assert [choice["text"] for choice in made["choices"]] == ["a", "a", "a"]
    assert (seen[0], len(seen)) == (num_before, 3)


@pytest.mark.parametrize(("path", "prompt"), [(COMPLETIONS, {"prompt": "ab"}), (CHAT, {"messages": MESSAGES})])
def test_prompt_logprobs_that_make_an_answer_too_large_are_not_computed(tokenizer, path, prompt, monkeypatch):
    """Two tokens with 20 likeliest ones each: 42 entries."""
    monkeypatch.setattr(answer_size, "MAX_ANSWER_BYTES", 42 * answer_size.LOGPROB_BYTES - 1)
    backend = Scorer()
    message = refusal(Front(tokenizer, backend), path, prompt_logprobs=20, max_tokens=1, **prompt)["message"]
    assert "prompt_logprobs: the answer would have more than" in message
    assert [request.wants for request in backend.requests] == []
