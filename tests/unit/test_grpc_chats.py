"""Conversations on the wire: tools, calls and template variables as JSON, limits, and refusals in one line."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import EchoBackend, make_service, write_tokenizer

from cluster.conversation import ChatMessage, Conversation, ToolCall
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.chats import MAX_JSON_CHARS, to_chat_messages, to_conversation
from cluster.serving.grpc.messages import to_prompt
from cluster.serving.text.tokenizer import Tokenizer

USER = pb.ChatMessage(role="user", content="Weather?")
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "<b>", "parameters": {"é": [1, None]}},
}
CALL = pb.ToolCall(id="c1", name="get_weather", arguments='{"place": "北京", "days": 2}')
CALLED = pb.ChatMessage(role="assistant", tool_calls=[CALL])
ANSWER = pb.ChatMessage(role="tool", content="sunny", tool_call_id="c1", name="get_weather")


def test_a_message_is_the_conversation_that_templates_read() -> None:
    chat = to_conversation(
        pb.ChatMessages(
            messages=[USER, CALLED, ANSWER, pb.ChatMessage(role="assistant")],
            tools=[json.dumps(WEATHER)],
            template_kwargs='{"enable_thinking": false}',
            documents=['{"title": "t"}'],
        )
    )
    call = {"name": "get_weather", "arguments": {"place": "北京", "days": 2}}
    assert chat.messages == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "get_weather"},
        {"role": "assistant", "content": ""},
    ]
    assert (chat.tools, chat.documents) == ([WEATHER], [{"title": "t"}])
    assert chat.template_kwargs == {"enable_thinking": False}
    assert (chat.add_generation_prompt, chat.continue_final_message, chat.chat_template) == (True, False, None)


def test_a_plain_conversation_has_no_tools_and_one_that_goes_on_no_new_turn() -> None:
    chat = to_conversation(pb.ChatMessages(messages=[USER], continue_final_message=True))
    assert (chat.tools, chat.documents, chat.template_kwargs) == (None, None, {})
    assert (chat.add_generation_prompt, chat.continue_final_message) == (False, True)


texts = st.text(max_size=8)
objects = st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts, max_size=2), max_size=2)
calls = st.builds(ToolCall, id=texts, name=texts.filter(bool), arguments=objects)
turns = st.builds(
    ChatMessage, role=st.sampled_from(["system", "user", "tool"]), content=texts, tool_call_id=texts, name=texts
) | st.builds(ChatMessage, role=st.just("assistant"), content=texts, tool_calls=st.lists(calls, max_size=2).map(tuple))


@settings(max_examples=100, deadline=None, database=None)
@given(
    messages=st.lists(turns, min_size=1, max_size=4),
    tools=st.none() | st.lists(objects, min_size=1, max_size=2),
    documents=st.none() | st.lists(objects, min_size=1, max_size=2),
    ending=st.sampled_from([(True, False), (False, True), (False, False)]),
    template_kwargs=st.fixed_dictionaries({}, optional={"x": objects}),
)
def test_what_a_client_sends_is_what_a_server_reads(messages, tools, documents, ending, template_kwargs) -> None:
    sent = Conversation(
        messages=messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=ending[0],
        continue_final_message=ending[1],
        template_kwargs=template_kwargs,
    )
    assert to_conversation(pb.ChatMessages.FromString(to_chat_messages(sent).SerializeToString())) == sent


def assistant(**call: str) -> pb.ChatMessage:
    return pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(**call)])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.ChatMessages(messages=[USER] * 2049), "chat has 2049 messages, 1 to 2048 are allowed"),
        (pb.ChatMessages(messages=[pb.ChatMessage(role="root")]), "message 0 has the role 'root', one of system, user"),
        (pb.ChatMessages(messages=[USER], tools=["{}", "{'a'}"]), r"tools\[1\] is no JSON \(Expecting property"),
        (pb.ChatMessages(messages=[USER], tools=["[]"]), r"tools\[0\] is \[\], a JSON object is needed"),
        (pb.ChatMessages(messages=[USER], tools=[""]), r"tools\[0\] is no JSON"),
        (pb.ChatMessages(messages=[USER], tools=["{}"] * 1025), "tools has 1025 objects, at most 1024"),
        (pb.ChatMessages(messages=[USER], documents=["7"]), r"documents\[0\] is 7, a JSON object"),
        (pb.ChatMessages(messages=[USER], template_kwargs="no"), "template_kwargs is no JSON"),
        (pb.ChatMessages(messages=[USER], template_kwargs='{"messages": 1}'), "has 'messages', which has a field of"),
        (pb.ChatMessages(messages=[USER], template_kwargs="[" * 99999), "template_kwargs has too many lists"),
        (
            pb.ChatMessages(messages=[USER], tools=['{"x":' + "[" * 99 + "]" * 99 + "}"]),
            r"tools\[0\] has more than 64 lists and objects in one another",
        ),
        (
            pb.ChatMessages(messages=[USER], tools=[json.dumps({"x": "a" * MAX_JSON_CHARS})]),
            "characters of JSON, at most 1048576",
        ),
        (pb.ChatMessages(messages=[assistant(name="f", arguments="x")]), "of 'f' in chat message 0 is no JSON"),
        (pb.ChatMessages(messages=[assistant(id="c")]), "chat message 0 has a tool call without a name"),
        (
            pb.ChatMessages(messages=[pb.ChatMessage(role="assistant", tool_calls=[CALL] * 2049)] * 2),
            "chat has 4098 tool calls, at most 4096 are allowed",
        ),
        (
            pb.ChatMessages(messages=[pb.ChatMessage(role="user", tool_calls=[CALL])]),
            "chat message 0 has tool_calls, which only an assistant makes",
        ),
        (
            pb.ChatMessages(messages=[USER], continue_final_message=True, add_generation_prompt=True),
            "ask for one of them",
        ),
    ],
)  # fmt: skip
def test_what_no_template_takes_is_refused_in_one_line(message: pb.ChatMessages, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        to_conversation(message)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("request_type", [pb.GenerateRequest, pb.GenerateStreamRequest, pb.TokenizeRequest])
def test_every_rpc_with_a_conversation_takes_tools(tmp_path: Path, request_type) -> None:
    from transformers import PreTrainedTokenizerFast

    model_dir = write_tokenizer(tmp_path, chat_template=None, eos_token="<|im_end|>")
    shutil.copy(Path(__file__).parent / "templates" / "qwen2.5.jinja", model_dir / "chat_template.jinja")
    service = make_service(Tokenizer(model_dir), EchoBackend())
    message = request_type(chat=pb.ChatMessages(messages=[USER, CALLED, ANSWER], tools=[json.dumps(WEATHER)]))
    ids = asyncio.run(service.tokenize(to_prompt(message)))
    service._work.end()
    call = {"name": "get_weather", "arguments": {"place": "北京", "days": 2}}
    expected = PreTrainedTokenizerFast.from_pretrained(model_dir).apply_chat_template(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "get_weather"},
        ],
        tools=[WEATHER],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == expected
