"""The conversations of protobuf messages: JSON is read, limits are checked. Knows no template."""

import json
from collections.abc import Sequence
from typing import Any

from cluster import inputs
from cluster.conversation import ChatMessage, Conversation, ToolCall
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb

CHAT_ROLES = ("system", "user", "assistant", "tool")
MAX_CHAT_MESSAGES = 2048
MAX_OBJECTS = 1024  # tools, and documents
MAX_TOOL_CALLS = 4096  # in all turns; each takes the ingress 15 µs, and its process for templates as long again
MAX_JSON_CHARS = 1 << 20  # some 10 ms of the ingress's event loop


def to_conversation(message: pb.ChatMessages) -> Conversation:
    """Raises InvalidRequest (field "chat"), also for JSON that is none."""
    turns = message.messages
    if not 1 <= len(turns) <= MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"chat has {len(turns)} messages, 1 to {MAX_CHAT_MESSAGES} are allowed", "chat")
    num_calls = sum(len(turn.tool_calls) for turn in turns)
    if num_calls > MAX_TOOL_CALLS:
        raise InvalidRequest(f"chat has {num_calls} tool calls, at most {MAX_TOOL_CALLS} are allowed", "chat")
    _check_json_size(message)
    open_end = message.continue_final_message
    hides_tools = message.tool_choice.mode == pb.TOOL_MODE_NONE
    return Conversation(
        messages=[_turn(turn, index) for index, turn in enumerate(turns)],
        tools=None if hides_tools else _objects(message.tools, "tools"),
        documents=_objects(message.documents, "documents"),
        add_generation_prompt=(
            message.add_generation_prompt if message.HasField("add_generation_prompt") else not open_end
        ),
        continue_final_message=open_end,
        template_kwargs=_object(message.template_kwargs, "template_kwargs") if message.template_kwargs else {},
    )


def to_chat_messages(chat: Conversation) -> pb.ChatMessages:
    """The message of a conversation whose contents are texts, for a client. Raises InvalidRequest."""
    if not all(isinstance(turn.get("content", ""), str) for turn in chat.messages):
        raise InvalidRequest("chat has a content that is no text, which no message carries", "chat")
    return pb.ChatMessages(
        messages=[_turn_message(turn) for turn in chat.messages],
        tools=[_text(tool) for tool in chat.tools or ()],
        documents=[_text(document) for document in chat.documents or ()],
        template_kwargs=_text(chat.template_kwargs) if chat.template_kwargs else "",
        continue_final_message=bool(chat.continue_final_message),
        add_generation_prompt=None if chat.add_generation_prompt else False,
    )


def _turn(turn: pb.ChatMessage, index: int) -> ChatMessage:
    if turn.role not in CHAT_ROLES:
        raise InvalidRequest(
            f"chat message {index} has the role {turn.role[:40]!r}, one of {', '.join(CHAT_ROLES)} is needed", "chat"
        )
    if turn.tool_calls and turn.role != "assistant":
        raise InvalidRequest(f"chat message {index} has tool_calls, which only an assistant makes", "chat")
    return ChatMessage(
        role=turn.role,
        content=turn.content,
        tool_calls=tuple(_call(call, index) for call in turn.tool_calls),
        tool_call_id=turn.tool_call_id,
        name=turn.name,
    )


def _call(call: pb.ToolCall, index: int) -> ToolCall:
    if not call.name:
        raise InvalidRequest(f"chat message {index} has a tool call without a name", "chat")
    where = f"arguments of {call.name[:40]!r} in chat message {index}"
    return ToolCall(id=call.id, name=call.name, arguments=_object(call.arguments, where) if call.arguments else {})


def _turn_message(turn: dict[str, Any]) -> pb.ChatMessage:
    calls = [call.get("function", call) | {"id": call.get("id", "")} for call in turn.get("tool_calls", ())]
    return pb.ChatMessage(
        role=turn["role"],
        content=turn.get("content", ""),
        tool_calls=[pb.ToolCall(id=c["id"], name=c["name"], arguments=_text(c["arguments"])) for c in calls],
        tool_call_id=turn.get("tool_call_id", ""),
        name=turn.get("name", ""),
    )


def _check_json_size(message: pb.ChatMessages) -> None:
    texts = [*message.tools, *message.documents, message.template_kwargs]
    texts += [call.arguments for turn in message.messages for call in turn.tool_calls]
    num_chars = sum(map(len, texts))
    if num_chars > MAX_JSON_CHARS:
        raise InvalidRequest(f"chat has {num_chars} characters of JSON, at most {MAX_JSON_CHARS} are allowed", "chat")


def _objects(texts: Sequence[str], name: str) -> list[Any] | None:
    """The objects; None for none, as a template asks whether there are any."""
    if len(texts) > MAX_OBJECTS:
        raise InvalidRequest(f"{name} has {len(texts)} objects, at most {MAX_OBJECTS} are allowed", "chat")
    return [_object(text, f"{name}[{i}]") for i, text in enumerate(texts)] or None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise InvalidRequest(f"{where} has too many lists and objects in one another", "chat") from None
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON ({error}): {inputs.shown(text)}", "chat") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is {inputs.shown(value)}, a JSON object is needed", "chat")
    return value


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
