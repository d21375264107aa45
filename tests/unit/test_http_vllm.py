"""Fields that vLLM's server has beside OpenAI's: each is taken, or named in docs/http.md as one that is not."""

import asyncio
import re
from pathlib import Path

import pytest
from http_tools import MODEL, Front, events
from serving_fakes import write_tokenizer

from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.completion_schema import CompletionRequest
from cluster.serving.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES = {CHAT: {"messages": [{"role": "user", "content": "abc"}]}, COMPLETIONS: {"prompt": "abcd"}}
# Of vLLM 0.32's ChatCompletionRequest and CompletionRequest, those that OpenAI's API does not have.
BOTH = re.findall(
    r"\w+",
    """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params ignore_eos include_stop_str_in_output
    kv_transfer_params length_penalty logprob_token_ids min_p min_tokens mm_payload priority prompt_logprobs
    repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens
    spaces_between_special_tokens stop_token_ids stream_interval structured_outputs thinking_token_budget top_k
    truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking
""",
)
CHATS = re.findall(
    r"\w+",
    """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents include_reasoning
    media_io_kwargs mm_processor_kwargs reasoning_effort return_prompt_text
""",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def post(tokenizer, path, **fields):
    return asyncio.run(Front(tokenizer).post(path, {"model": MODEL, **BODIES[path], **fields}))


def test_every_field_of_vllm_is_taken_or_in_the_table_of_those_that_are_not():
    page = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    table = page.partition("of those that vLLM 0.32 takes:")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    refused = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    for names, body in ((BOTH + CHATS, ChatRequest), ([*BOTH, "prompt_embeds"], CompletionRequest)):
        for name in names:
            assert (name in body.model_fields) != (name in refused), name
    assert len(refused) > 20


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_vllms_defaults_are_taken_and_other_values_refused(tokenizer, path):
    neutral = {
        "use_beam_search": False, "skip_special_tokens": True, "priority": 0, "length_penalty": 1.0,
        "spaces_between_special_tokens": True, "add_special_tokens": False, "session_id": "s",
    }  # fmt: skip
    assert post(tokenizer, path, max_tokens=2, **neutral).status_code == 200
    others = {"use_beam_search": True, "skip_special_tokens": False, "priority": 1, "truncate_prompt_tokens": 0}
    for name, value in others.items():
        answer = post(tokenizer, path, **{name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_the_stop_string_is_named_and_kept_where_it_is_asked_for(tokenizer, include, text, stream):
    """The fake engine answers with the prompt's tokens."""
    fields = {"stop": ["c"], "max_tokens": 4, "include_stop_str_in_output": include, "stream": stream}
    answer = post(tokenizer, COMPLETIONS, **fields)
    found = events(answer)[:-1] if stream else [answer.json()]
    choices = [one["choices"][0] for one in found]
    assert "".join(choice["text"] for choice in choices) == text
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "c")


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_names_the_stop_string_too(tokenizer, stream):
    answer = post(tokenizer, CHAT, stop=["user"], max_tokens=20, include_stop_str_in_output=True, stream=stream)
    [*_, choice] = [one["choices"][0] for one in (events(answer)[:-1] if stream else [answer.json()])]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "user")
    if not stream:
        assert choice["message"]["content"].endswith("user")


def test_a_prompts_last_tokens_are_the_prompt(tokenizer):
    ask = {"max_tokens": 2, "return_token_ids": True, "truncate_prompt_tokens": 2}
    whole = tokenizer.encode("abcd")
    for prompt in ("abcd", whole):
        choice = post(tokenizer, COMPLETIONS, prompt=prompt, echo=True, **ask).json()["choices"][0]
        assert choice["prompt_token_ids"] == whole[-2:]
        assert choice["text"].startswith(tokenizer.decode(whole[-2:]))
    answer = post(tokenizer, CHAT, **ask).json()
    assert (len(answer["prompt_token_ids"]), answer["usage"]["prompt_tokens"]) == (2, 2)


def test_tokens_are_named_by_their_ids_and_offsets_stay_those_of_the_text(tokenizer):
    ask = {"max_tokens": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = post(tokenizer, COMPLETIONS, logprobs=0, **ask).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    first = tokenizer.decode(choice["token_ids"][:1])
    assert choice["logprobs"]["text_offset"] == [0, len(first)]
    choice = post(tokenizer, CHAT, logprobs=True, **ask).json()["choices"][0]
    named = [(one["token"], bytes(one["bytes"]).decode()) for one in choice["logprobs"]["content"]]
    assert named == [(f"token_id:{token}",) * 2 for token in choice["token_ids"]]


def test_a_call_has_its_name(tokenizer):
    assert post(tokenizer, CHAT, max_tokens=1, request_id="mine").json()["id"] == "chatcmpl-mine"
    assert post(tokenizer, COMPLETIONS, max_tokens=1, request_id="mine").json()["id"] == "cmpl-mine"
    assert post(tokenizer, COMPLETIONS, max_tokens=1, request_id="a b").status_code == 400
