"""Conversations rendered with published chat templates, and with made ones, against transformers' rendering.

templates/ has the templates as their models publish them: qwen2 is that of Qwen2-57B-A14B-Instruct, Qwen2-7B-Instruct
and the later files of the Qwen1.5 chat models, qwen1.5 that of their first ones, qwen2.5 that of Qwen2.5-7B-Instruct,
hermes the tool_use template of Hermes 3.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.checkpoint.made.tokenizer import CHAT_TEMPLATE
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.conversation import ChatMessage, Conversation, ToolCall
from cluster.errors import InvalidRequest
from cluster.serving.text.rendering import ChatRenderer
from cluster.serving.text.tokenizer import Tokenizer

PUBLISHED = ("qwen1.5", "qwen2", "qwen2.5", "hermes")
MADE = {
    "all": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{% for m in messages %}{{ m | tojson(indent=1) }}"
    "{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{{ tools | tojson(sort_keys=true) }}"
    "{{ documents }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}"
    "{{ enable_thinking is defined and enable_thinking }}{{ style }}",
    "blocks": "{% set ns = namespace(n=0) %}{% set x = 'outside' %}\n  {% for m in messages %}\n"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{% if ns.n > 3 %}{% break %}{% endif %}"
    "  {% generation %}{% set x = 'inside' %}{{ m.content }}{% set ns.n = ns.n + 1 %}{% endgeneration %}\n"
    "  {% endfor %}{{ x }}{{ ns.n }}{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab', 0) | tojson(separators=(',', ':')) }}",
    "strict": "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate:\n user, assistant') }}{% endif %}{{ m.content | trim }}\n{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text | default('?') }}{% endfor %}{% endif %}{{ m.thinking }}{{ m.reasoning_content }}<e>{% endfor %}",
}
USER = {"role": "user", "content": "Weather?"}
REFUSED = [
    "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "{% set ns = namespace(x=1) %}{% set ns._x = 2 %}",
    "{% for m in messages %}{{ m.content.nothing.more }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ tools.missing.more | tojson }}",
    "{{ raise_exception(7) }}",
    "{% include 'x' %}",
    "{{ messages[0] | tojson(indent='x', sort_keys=1, separators=3) }}",
    "{{ 1 / 0 }}",
    "{{ '%d' % 'x' }}",
]


@pytest.fixture(scope="module")
def model_dir(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with every template in a file of its own."""
    path = Path(shutil.copytree(demo_checkpoint, tmp_path_factory.mktemp("chat") / "model"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    folder = path / "additional_chat_templates"
    folder.mkdir()
    for name in PUBLISHED:
        shutil.copy(Path(__file__).parent / "templates" / f"{name}.jinja", folder)
    for name, source in MADE.items():
        (folder / f"{name}.jinja").write_text(source)
    return path


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def renderer(model_dir: Path) -> ChatRenderer:
    return ChatRenderer(model_dir, read_tokenizer_config(model_dir))


def compare(renderer: ChatRenderer, oracle: PreTrainedTokenizerBase, template: str | None, chat: dict[str, Any]) -> Any:
    """Asserts that both render the same, or that both refuse; returns our text or refusal."""
    kwargs = chat.get("template_kwargs", {})
    given = {k: v for k, v in chat.items() if k not in ("messages", "template_kwargs")}
    expected = None
    with suppress(Exception):  # a template may raise anything
        expected = oracle.apply_chat_template(
            chat["messages"], tokenize=False, chat_template=template, **given, **kwargs
        )
    if expected is not None:
        rendered = renderer.render(Conversation(**chat, chat_template=template))
        assert rendered == expected
        return rendered
    with pytest.raises(InvalidRequest) as refused:
        renderer.render(Conversation(**chat, chat_template=template))
    assert "\n" not in str(refused.value)
    return refused.value


texts = st.text(max_size=12) | st.sampled_from(
    ["", " ", "<|im_end|>", "<tool_call>", "é\n", "\u2028🙂", "{{ x }}", '"<']
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=32) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, json_values, max_size=3)
roles = st.sampled_from(["system", "user", "user", "assistant", "tool"])
plain_turns = st.fixed_dictionaries(
    {"role": roles, "content": texts}, optional={"name": texts, "tool_call_id": texts, "tool_calls": st.none()}
)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": texts, "arguments": objects})},
    optional={"id": texts, "type": st.just("function")},
)
calling_turns = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(calls, max_size=2)}, optional={"content": texts | st.none()}
)
odd_turns = st.fixed_dictionaries(
    {"role": roles},
    optional={
        "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3) | json_values,
        "tool_calls": st.lists(st.fixed_dictionaries({"name": texts, "arguments": objects | texts}), max_size=2),
        "reasoning": texts | st.none(),
        "reasoning_content": texts,
        "thinking": texts,
    },
)
turns = st.one_of(plain_turns, plain_turns, plain_turns, calling_turns, calling_turns, odd_turns)
types = st.sampled_from(["string", "number", "object", ["string", "null"], "thing"])
properties = st.dictionaries(texts, st.fixed_dictionaries({"type": types, "description": texts}), max_size=3)
functions = st.fixed_dictionaries(
    {
        "name": texts,
        "description": texts,
        "parameters": st.fixed_dictionaries({"type": st.just("object"), "properties": properties}),
    },
    optional={"return": st.fixed_dictionaries({"type": types}, optional={"description": texts})},
)
typed = st.fixed_dictionaries({"type": st.just("function"), "function": functions})
tools = st.lists(st.one_of(functions, functions, typed, typed, typed, objects), max_size=2)
endings = st.sampled_from([(True, False)] * 4 + [(False, False)] * 2 + [(False, True), (False, "reasoning_content")])
kwargs = st.fixed_dictionaries(
    {}, optional={"enable_thinking": st.booleans(), "style": json_values, "eos_token": texts}
)


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """Half of them have turns that every template takes, and text that ends where an answer begins."""
    usual = draw(st.booleans())
    ending = (True, False) if usual else draw(endings)
    extra = {} if draw(st.booleans()) else {"documents": draw(st.lists(objects, max_size=2))}
    return {
        "messages": draw(st.lists(plain_turns if usual else turns, min_size=1, max_size=4)),
        "tools": draw(tools | st.none()),
        "template_kwargs": draw(kwargs),
        "add_generation_prompt": ending[0],
        "continue_final_message": ending[1],
        **extra,
    }


@pytest.mark.parametrize("template", [*PUBLISHED, *MADE, None])
def test_generated_conversations_are_rendered_as_transformers_does(
    renderer: ChatRenderer, oracle: PreTrainedTokenizerBase, template: str | None
) -> None:
    outcomes = []

    @settings(max_examples=80, deadline=None, database=None)
    @example({"messages": [USER], "add_generation_prompt": True})
    @given(chats())
    def same(chat: dict[str, Any]) -> None:
        outcomes.append(compare(renderer, oracle, template, chat))

    same()
    assert any(isinstance(outcome, str) for outcome in outcomes)  # of a strict template most are refused


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_transformers_refuses_is_refused(
    renderer: ChatRenderer, oracle: PreTrainedTokenizerBase, template: str
) -> None:
    refused = compare(renderer, oracle, template, {"messages": [USER], "add_generation_prompt": True})
    assert isinstance(refused, InvalidRequest)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place <today> & tomorrow",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Grüße, 北京"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "北京", "days": 2}}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"celsius": 20}', "tool_call_id": "c1", "name": "get_weather"},
    {"role": "tool", "content": "sunny", "tool_call_id": "c2", "name": "get_weather"},
    {"role": "assistant", "content": "20 degrees."},
    {"role": "user", "content": "Thanks"},
]


def test_a_conversation_with_tools_is_what_qwen_publishes(
    renderer: ChatRenderer, oracle: PreTrainedTokenizerBase
) -> None:
    """By hand: the tool as JSON without HTML escapes, two calls in one turn, two results in one user's turn."""
    chat = {"messages": TOOL_TURNS, "tools": [WEATHER], "add_generation_prompt": True}
    rendered = compare(renderer, oracle, "qwen2.5", chat)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "北京", "days": 2}}\n</tool_call>'
    assert rendered.startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
    )
    assert f"<tools>\n{json.dumps(WEATHER, ensure_ascii=False)}\n</tools>" in rendered
    assert rendered.endswith(
        f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"celsius": 20}\n</tool_response>\n<tool_response>\nsunny\n</tool_response>'
        "<|im_end|>\n<|im_start|>assistant\n20 degrees.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for template in PUBLISHED:
        compare(renderer, oracle, template, chat)


def test_typed_turns_are_the_objects_that_templates_read(renderer: ChatRenderer) -> None:
    call = ToolCall(id="c1", name="get_weather", arguments={"place": "北京", "days": 2})
    turns = [
        ChatMessage(role="user", content="Weather?"),
        ChatMessage(role="assistant", tool_calls=(call, call)),
        ChatMessage(role="tool", content='{"celsius": 20}', tool_call_id="c1", name="get_weather"),
        ChatMessage(role="tool", content="sunny", tool_call_id="c2", name="get_weather"),
        ChatMessage(role="assistant", content="20 degrees."),
        ChatMessage(role="user", content="Thanks"),
    ]
    assert Conversation(messages=turns).messages == Conversation(messages=TOOL_TURNS).messages


@pytest.mark.parametrize(
    ("messages", "ending"),
    [
        ([USER, {"role": "assistant", "content": "It is"}], True),
        ([USER, {"role": "assistant", "content": "It is  "}], True),
        ([USER, {"role": "assistant", "content": ""}], True),
        ([USER, {"role": "assistant", "content": "x", "thinking": "Let me"}], "thinking"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], True),
        ([USER, {"role": "assistant", "content": []}], True),
        ([USER, {"role": "assistant"}], True),
        ([{"role": "assistant", "content": "It is"}, USER], True),
    ],
)
@pytest.mark.parametrize("template", [*PUBLISHED, *MADE])
def test_a_last_turn_goes_on_where_it_does_in_transformers(
    renderer: ChatRenderer, oracle: PreTrainedTokenizerBase, template: str, messages: Any, ending: Any
) -> None:
    chat = {"messages": messages, "add_generation_prompt": False, "continue_final_message": ending}
    rendered = compare(renderer, oracle, template, chat)
    if template == "qwen2" and ending is True and messages[-1].get("content") == "It is":
        assert rendered.endswith("<|im_start|>assistant\nIt is")


def test_the_tokenizer_encodes_what_is_rendered(model_dir: Path, oracle: PreTrainedTokenizerBase) -> None:
    tokenizer = Tokenizer(model_dir)
    for template in ("qwen2.5", "hermes"):
        chat = Conversation(messages=TOOL_TURNS, tools=[WEATHER], chat_template=template)
        expected = oracle.apply_chat_template(
            TOOL_TURNS, tools=[WEATHER], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode_chat(chat) == expected


def write_templates(path: Path, where: dict[str, Any]) -> None:
    """where: of the config's value ("config"), of chat_template.jinja ("file"), of the folder ("folder")."""
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if "config" in where:
        config["chat_template"] = where["config"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if "file" in where:
        (path / "chat_template.jinja").write_text(where["file"])
    if "folder" in where:
        (path / "additional_chat_templates").mkdir()
        for name, source in where["folder"].items():
            (path / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    if "processor" in where:
        (path / "chat_template.json").write_text(json.dumps({"chat_template": where["processor"]}))


NAMED = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "named tools"}]


@pytest.mark.parametrize(
    ("where", "plain", "with_tools"),
    [
        ({"config": "lone"}, "lone", "lone"),
        ({"config": NAMED}, "named", "named tools"),
        ({"config": NAMED[:1]}, "named", "named"),
        ({"config": NAMED[1:]}, None, "named tools"),
        ({"config": NAMED, "file": "file"}, "file", "file"),
        ({"config": "lone", "folder": {"tool_use": "in folder"}}, None, "in folder"),
        ({"config": "lone", "file": "file", "folder": {"tool_use": "in folder"}}, "file", "in folder"),
        ({"file": "file", "folder": {"default": "in folder"}}, "in folder", "in folder"),
        ({"processor": "for images"}, None, None),
        ({"processor": "for images", "config": "lone"}, "lone", "lone"),
        ({}, None, None),
    ],
)
def test_a_template_is_found_where_transformers_finds_it(
    demo_checkpoint: Path, tmp_path: Path, where: dict[str, Any], plain: str | None, with_tools: str | None
) -> None:
    path = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    write_templates(path, where)
    oracle, renderer = AutoTokenizer.from_pretrained(path), ChatRenderer(path)
    for tools, expected in (({}, plain), ({"tools": []}, with_tools), ({"tools": [WEATHER]}, with_tools)):
        found = compare(renderer, oracle, None, {"messages": [USER], "add_generation_prompt": True, **tools})
        assert found == expected if expected is not None else isinstance(found, InvalidRequest)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ({"messages": []}, "chat has 0 messages"),
        ({"messages": "hi"}, "messages is 'hi', a list is needed"),
        ({"messages": ["hi"]}, "message 0 is 'hi', an object with a role"),
        ({"messages": [{"content": "hi"}]}, "message 0 has the role None"),
        ({"messages": [{"role": "user", "content": object}]}, "message 0 has a type, a chat template takes texts"),
        ({"messages": [USER], "tools": [print]}, r"tools\[0\] has a builtin_function_or_method"),
        ({"messages": [USER], "tools": ["f"]}, r"tools\[0\] is 'f', a JSON object is needed"),
        ({"messages": [USER], "documents": 7}, "documents is 7, a list is needed"),
        ({"messages": [USER], "template_kwargs": {"tools": []}}, "has 'tools', which has a field of its own"),
        ({"messages": [USER], "continue_final_message": True}, "ask for one of them"),
        ({"messages": [USER], "add_generation_prompt": "no"}, "true or false is needed"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(chat: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        Conversation(**chat)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("template", ["qwen1.5", "qwen2", "qwen2.5"])
def test_a_template_of_texts_refuses_parts_as_in_transformers_and_says_why(
    renderer: ChatRenderer, oracle: PreTrainedTokenizerBase, template: str
) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    refused = compare(renderer, oracle, template, {"messages": turns, "add_generation_prompt": True})
    assert "(TypeError); it may read contents that are texts only, not lists of parts" in str(refused)


def test_nested_values_have_a_limit() -> None:
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="more than 64 lists and objects in one another"):
        Conversation(messages=[USER], template_kwargs={"x": deep})
