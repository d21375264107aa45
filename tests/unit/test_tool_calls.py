"""Calls of tools in texts: read whole and in pieces cut anywhere, over HTTP, and forced by a grammar."""

import asyncio
import itertools
import json
from dataclasses import replace

import jsonschema
import pytest
from http_tools import MODEL, Front, events
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import EchoBackend, byte_ids, write_tokenizer

from cluster import LLM, SamplingParams
from cluster.conversation import ToolCall
from cluster.errors import InvalidRequest
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.tools.forced import forced_calls
from cluster.serving.tools.hermes import Arguments, CallBegins, HermesReader, Text
from cluster.serving.tools.whole import read_calls
from cluster.types import SequenceUpdate


def read(*pieces):
    """The content, then each call's name and arguments."""
    reader = HermesReader()
    found = [event for piece in pieces for event in reader.push(piece)] + reader.end()
    content = "".join(event.text for event in found if isinstance(event, Text))
    calls = [[event.name, ""] for event in found if isinstance(event, CallBegins)]
    for event in found:
        if isinstance(event, Arguments):
            calls[event.number][1] += event.text
    return content, [tuple(call) for call in calls]


TWO = """Let me look.
<tool_call>
{"name": "weather", "arguments": {"city": "Paris </tool_call> {", "days": [1, {"x": "\\""}]}}
</tool_call>
<tool_call>
{"arguments": {"q": 1}, "name": "search"}
</tool_call>
"""
READ = {
    TWO: (
        "Let me look.",
        [("weather", '{"city": "Paris </tool_call> {", "days": [1, {"x": "\\""}]}'), ("search", '{"q": 1}')],
    ),
    "no call, \n": ("no call, \n", []),
    "a < b, <tool": ("a < b, <tool", []),
    "<tool_call>no JSON</tool_call> then": ("<tool_call>no JSON</tool_call> then", []),
    '<tool_call>{"arguments": {}}</tool_call>': ('<tool_call>{"arguments": {}}</tool_call>', []),
    '<tool_call>{"name": "f"}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "parameters": {"a": 1}}': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "arguments": {"a": "cut of': ("", [("f", '{"a": "cut of')]),
    '<tool_call>{"name": "f", "arg': ('<tool_call>{"name": "f", "arg', []),
    '<tool_call>{"name": "\\u00e9", "arguments": {}}</tool_call> after ': ("after", [("é", "{}")]),
    "<tool_call>" + "[" * 5000 + "</tool_call>": ("<tool_call>" + "[" * 5000 + "</tool_call>", []),
}


@pytest.mark.parametrize(("text", "expected"), READ.items(), ids=range(len(READ)))
def test_calls_are_read_whole_and_cut_at_every_place(text, expected):
    assert read(text) == expected
    assert read(*text) == expected
    for place in range(len(text)) if len(text) < 1000 else ():
        assert read(text[:place], text[place:]) == expected


PARTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": ',
    '{"a": 1}',
    "}",
    '"',
    "\\",
    " ",
    "\n",
    "x",
    "<",
    "[",
]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), cuts=st.lists(st.integers(0, 80), max_size=4))
def test_what_is_read_does_not_depend_on_the_cuts(parts, cuts):
    text = "".join(parts)
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[first:last] for first, last in itertools.pairwise(places)]
    assert read(*pieces) == read(*text) == read(text)


def test_whole_calls_have_objects_and_what_is_cut_off_or_too_deep_stays_text():
    """An answer of a batch must not end the others by its depth."""
    call = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
    assert read_calls("a " + call % '{"x": [1]}') == ("a", (ToolCall(name="f", arguments={"x": [1]}, id="call_0"),))
    assert read_calls(call[:-13] % '{"x": "cut')[1] == ()
    content, calls = read_calls(call % ('{"x": ' + "[" * 100_000))
    assert calls == ()
    assert "[[[[" in content


def test_arguments_come_while_they_are_written():
    reader = HermesReader()
    assert reader.push('<tool_call>{"name": "f", "argu') == []
    assert reader.push('ments": {"a"') == [CallBegins(0, "f"), Arguments(0, '{"a"')]
    assert reader.push(': "b') == [Arguments(0, ': "b')]


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
POINT = {
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}},
    "required": ["x"],
}
TOOLS = [
    {"type": "function", "function": {"name": 'say "hi"', "parameters": {**CITY, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "point", "parameters": {**POINT, "additionalProperties": False}}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as made:
        yield made


@pytest.mark.parametrize(("name", "several"), [(None, True), (None, False), ("point", True)])
def test_forced_calls_are_calls_of_the_tools(llm, name, several):
    """Of a model of random weights."""
    form = forced_calls(TOOLS, name, several=several)
    params = SamplingParams(temperature=1, top_p=1, top_k=0, max_tokens=400, structured_outputs=form)
    for output in llm.generate(["Call"] * 4, [replace(params, seed=seed) for seed in range(4)]):
        content, calls = read(output.text)
        assert content == ""
        assert calls
        if output.finish_reason == "length":
            calls.pop()
        assert len(calls) <= 1 or (several and name is None)
        for called, arguments in calls:
            assert name in (None, called)
            jsonschema.validate(json.loads(arguments), SCHEMAS[called])


@pytest.mark.parametrize(("tools", "name"), [([], None), (TOOLS, "other")])
def test_a_call_that_no_tool_answers_is_refused(tools, name):
    with pytest.raises(InvalidRequest, match="tool_choice asks for a call"):
        forced_calls(tools, name)


ANSWER = 'Look:\n<tool_call>\n{"name": "point", "arguments": {"x": 3}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def front(tokenizer, text=ANSWER):
    ids = tokenizer.encode(text)
    script = [SequenceUpdate(request_id="r", token_ids=(i,), constrained=True) for i in ids[:-1]]
    last = SequenceUpdate(request_id="r", token_ids=(ids[-1],), finish_reason="stop", constrained=True)
    return Front(tokenizer, EchoBackend(script=[*script, last]))


def asked(**fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, **fields}


def test_an_answer_over_http_has_its_calls(tokenizer):
    answer = asyncio.run(front(tokenizer).post("/v1/chat/completions", asked())).json()["choices"][0]
    [call] = answer["message"]["tool_calls"]
    assert answer["message"]["content"] == "Look:"
    assert call["function"] == {"name": "point", "arguments": '{"x": 3}'}
    assert call["id"].startswith("call_")
    assert answer["finish_reason"] == "tool_calls"


def test_deltas_over_http_add_up_to_the_calls(tokenizer):
    response = asyncio.run(front(tokenizer).post("/v1/chat/completions", asked(stream=True)))
    choices = [event["choices"][0] for event in events(response) if event != "[DONE]"]
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Look:"
    assert (deltas[0]["function"]["name"], deltas[0]["type"]) == ("point", "function")
    assert all("id" not in delta for delta in deltas[1:])
    assert len(deltas) > 3
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"x": 3}'
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_without_tools_or_with_none_the_answer_is_text(tokenizer):
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        answer = asyncio.run(front(tokenizer).post("/v1/chat/completions", asked(**fields))).json()["choices"][0]
        assert answer["message"]["content"] == ANSWER
        assert answer["finish_reason"] == "stop"


def test_a_second_call_is_left_out_where_one_is_wanted(tokenizer):
    twice = front(tokenizer, ANSWER + ANSWER[6:])
    answer = asyncio.run(twice.post("/v1/chat/completions", asked(parallel_tool_calls=False))).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


def test_a_required_call_that_is_cut_off_is_no_content(tokenizer):
    cut = front(tokenizer, ANSWER[ANSWER.index("<tool_call>") :][:8])
    required, free = (
        asyncio.run(cut.post("/v1/chat/completions", asked(tool_choice=choice))).json()["choices"][0]["message"]
        for choice in ("required", "auto")
    )
    assert (required["content"], free["content"]) == ("", "<tool_ca")


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "point"}}, "stop")],
)
def test_a_tool_choice_becomes_the_form_of_the_answer(tokenizer, choice, reason):
    served = front(tokenizer)
    answer = asyncio.run(served.post("/v1/chat/completions", asked(tool_choice=choice))).json()
    assert answer["choices"][0]["finish_reason"] == reason
    [request] = served.backend.requests
    assert request.constraint[0] == "grammar"
    assert "<tool_call>" in request.constraint[1]
    assert ("Rome" in request.constraint[1]) == (choice == "required")


def bounded(schema):
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": " |\\n {0,8}"}})


FORMS = {
    "response_format of any object": (
        {"response_format": {"type": "json_object"}},
        ("json", bounded({"type": "object"})),
    ),
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": CITY, "strict": True}}},
        ("json", bounded(CITY)),
    ),
    "text": ({"response_format": {"type": "text"}}, None),
    "guided_json": ({"guided_json": CITY}, ("json", bounded(CITY))),
    "guided_json as a text": ({"guided_json": json.dumps(CITY)}, ("json", bounded(CITY))),
    "guided_regex": ({"guided_regex": "a+"}, ("regex", "a+")),
    "guided_choice": ({"guided_choice": ["a", "b"]}, ("choice", '["a", "b"]')),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
    "structured_outputs": ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
}


@pytest.mark.parametrize(("fields", "constraint"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_fields_of_http_requests_ask_for_a_form(tokenizer, fields, constraint, path):
    served = front(tokenizer, "a")
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    response = asyncio.run(served.post(path, {"model": MODEL, **prompt, **fields}))
    assert response.status_code == 200, response.text
    assert [request.constraint for request in served.backend.requests] == [constraint]


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"guided_regex": "(?=a)"}, "guided_regex", "guided_regex cannot be used: invalid regex"),
        ({"guided_choice": []}, "guided_choice", "guided_choice is ()"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "guided_regex and guided_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format", "no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}},
         "response_format", "response_format cannot be used"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "jsn"),
        ({"structured_outputs": {"json": 7}}, "structured_outputs", "structured_outputs.json is 7"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "another form"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
          "tool_choice": "required"}, "tools", "tools cannot be used"),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
         "no function 'f'"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_is_refused_by_its_fields_name(tokenizer, fields, param, word):
    served = front(tokenizer)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    response = asyncio.run(served.post("/v1/chat/completions", body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert word in response.json()["error"]["message"]
    assert not served.backend.requests


def test_a_replica_that_knows_no_forms_gives_no_answer_in_place_of_one(tokenizer):
    old = Front(tokenizer, EchoBackend(script=[SequenceUpdate(request_id="r", token_ids=byte_ids("a"))]))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "guided_regex": "b"}
    response = asyncio.run(old.post("/v1/chat/completions", body))
    assert response.status_code == 503
    assert "older version" in response.json()["error"]["message"]


HI = [{"role": "user", "content": "hi"}]
LONG = {"temperature": 1, "top_p": 1, "top_k": 0, "max_tokens": 400, "seed": 1}


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", SCHEMAS), ({"type": "function", "function": {"name": "point"}}, ["point"])],
    ids=["required", "named"],
)
def test_an_offline_chat_calls_what_it_must(llm, choice, names):
    [answer] = llm.chat(HI, LONG, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    [call] = answer.tool_calls
    assert call.name in names
    jsonschema.validate(call.arguments, SCHEMAS[call.name])
    assert read(answer.text) == ("", [(call.name, read(answer.text)[1][0][1])])
    turn = answer.message.as_json()
    assert turn["tool_calls"][0]["function"] == {"name": call.name, "arguments": call.arguments}
    assert "content" not in turn


def test_an_offline_chat_reads_calls_unless_it_shows_no_tools(llm):
    """A model of random weights calls by a form that the caller gives."""
    params = {**LONG, "structured_outputs": {"regex": "Look: " + ANSWER[6:].replace("{", r"\{").replace("}", r"\}")}}
    [auto], [none] = (llm.chat(HI, params, tools=TOOLS, tool_choice=choice) for choice in ("auto", "none"))
    assert [(call.name, call.arguments) for call in auto.tool_calls] == [("point", {"x": 3})]
    assert (auto.content, auto.message.content) == ("Look:", "Look:")
    assert auto.text == none.text == "Look: " + ANSWER[6:]
    assert (none.tool_calls, none.content, none.message.content) == ((), None, none.text)


def test_tools_that_are_not_shown_are_not_in_the_prompt(llm, monkeypatch):
    shown = []
    monkeypatch.setattr(llm.tokenizer, "encode_chat", lambda chat: shown.append(chat.tools) or [1, 2])
    for choice in (None, "auto", "none", "required"):
        llm.chat(HI, {"max_tokens": 1}, tools=TOOLS, tool_choice=choice)
    assert shown == [TOOLS, TOOLS, None, TOOLS]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice is 'some'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice is"),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"tools": [{"name": "f"}], "tool_choice": "required"}, r"tools\[0\] has no function"),
        ({"tools": TOOLS, "tool_choice": "required", "params": {"structured_outputs": {"regex": "a"}}}, "another form"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_offline(llm, options, word):
    with pytest.raises(InvalidRequest, match=word):
        llm.chat(HI, **options)
