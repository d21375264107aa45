"""`LLM.chat` on the demo checkpoint: its prompts are those of transformers' `apply_chat_template`."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster import LLM, SamplingParams
from cluster.conversation import ChatMessage
from cluster.errors import InvalidRequest

TEMPLATES = Path(__file__).parent / "templates"
ONE = SamplingParams(temperature=0, max_tokens=1)
HELLO = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hello 🙂"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = [
    {"role": "user", "content": "x?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<f>", "parameters": {"properties": {}}}}]


@pytest.fixture(scope="module")
def model_dir(demo_checkpoint, tmp_path_factory):
    path = Path(shutil.copytree(demo_checkpoint, tmp_path_factory.mktemp("chat") / "model"))
    (path / "additional_chat_templates").mkdir()
    shutil.copy(TEMPLATES / "qwen2.jinja", path / "chat_template.jinja")
    shutil.copy(TEMPLATES / "qwen2.5.jinja", path / "additional_chat_templates" / "tool_use.jinja")
    return path


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(model_dir, dtype="float32", kv_cache_bytes=4 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def oracle(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (HELLO, {}),
        (CALLING, {"tools": TOOLS}),
        (CALLING, {"chat_template": "tool_use"}),
        ([*HELLO, {"role": "assistant", "content": "Hi, I"}], {"continue_final_message": True}),
        (HELLO, {"add_generation_prompt": False}),
        (HELLO, {"chat_template": "{{ messages[-1].content }}{{ style }}", "chat_template_kwargs": {"style": "!"}}),
        (HELLO, {"documents": [{"title": "t", "text": "x"}], "chat_template": "{{ documents | tojson }}"}),
    ],
)
def test_a_conversation_is_the_prompt_that_transformers_makes_of_it(llm, oracle, messages, options):
    [output] = llm.chat(messages, ONE, **options)
    renamed = {key: value for key, value in options.items() if key != "chat_template_kwargs"}
    renamed |= options.get("chat_template_kwargs", {})
    renamed.setdefault("add_generation_prompt", not options.get("continue_final_message"))
    expected = oracle.apply_chat_template(messages, return_dict=False, **renamed)
    assert list(output.prompt_token_ids) == expected
    assert len(output.token_ids) == 1


def test_several_conversations_are_answered_as_each_alone(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 3)]
    many = [HELLO, [ChatMessage(role="user", content="x")]]
    outputs = llm.chat(many, params)
    assert [len(output.token_ids) for output in outputs] == [2, 3]
    for messages, chosen, output in zip(many, params, outputs, strict=True):
        [alone] = llm.chat(messages, chosen)
        assert (alone.prompt_token_ids, alone.token_ids) == (output.prompt_token_ids, output.token_ids)


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ("hi", {}, "messages is 'hi', a list of messages is needed"),
        ([], {}, "chat has 0 messages"),
        ([HELLO, []], {}, r"messages\[1\]: chat has 0 messages"),
        (["hi"], {}, "message 0 is 'hi', an object with a role and a content is needed"),
        (HELLO, {"continue_final_message": True, "add_generation_prompt": True}, "ask for one of them"),
        (HELLO, {"chat_template": "{% if"}, "chat_template cannot be compiled: TemplateSyntaxError"),
        (HELLO, {"chat_template": "{{ raise_exception('no\nnever') }}"}, "chat template: no never"),
        (HELLO, {"tools": [print]}, r"tools\[0\] has a builtin_function_or_method"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(llm, messages, options, reason):
    with pytest.raises(InvalidRequest, match=reason) as refused:
        llm.chat(messages, ONE, **options)
    assert "\n" not in str(refused.value)


def test_without_the_tokenizer_a_conversation_is_refused(model_dir):
    with (
        LLM(model_dir, dtype="float32", kv_cache_bytes=1 << 20, skip_tokenizer=True) as llm,
        pytest.raises(InvalidRequest, match="chat needs the tokenizer, which skip_tokenizer left out"),
    ):
        llm.chat(HELLO)
