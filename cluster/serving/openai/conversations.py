"""A chat's messages and tools as a conversation for the chat template. Knows no template."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster import inputs
from cluster.conversation import Conversation
from cluster.errors import InvalidRequest
from cluster.serving.openai.chat_schema import CalledTool, ChatRequest, ContentPart, MessageBody

MAX_MESSAGES = 2048
MAX_OBJECTS = 1024  # tools, and documents
_PARTS = {"tools": "tools", "documents": "documents", "template_kwargs": "chat_template_kwargs"}
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's other words; templates know none of them


def check_length(num_messages: int) -> None:
    """Raises InvalidRequest for a conversation that has none, or too many."""
    if not 1 <= num_messages <= MAX_MESSAGES:
        raise InvalidRequest(f"messages has {num_messages} messages, 1 to {MAX_MESSAGES} are allowed", "messages")


def to_conversation(body: ChatRequest) -> Conversation:
    """Raises InvalidRequest."""
    check_length(len(body.messages))
    tools = None if body.tool_choice == "none" else body.tools
    for name, objects in (("tools", tools), ("documents", body.documents)):
        if objects is not None and len(objects) > MAX_OBJECTS:
            raise InvalidRequest(f"{name} has {len(objects)} objects, at most {MAX_OBJECTS} are allowed", name)
    open_end = bool(body.continue_final_message)
    begins = body.add_generation_prompt
    messages = [_turn(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    with _naming_parts():
        return Conversation(
            messages=messages,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            documents=body.documents,
            add_generation_prompt=not open_end if begins is None else begins,
            continue_final_message=open_end,
            template_kwargs=body.chat_template_kwargs or {},
        )


@contextmanager
def _naming_parts() -> Iterator[None]:
    """Gives a refusal of what a template gets beside the messages the name of its field. Its text begins with it."""
    try:
        yield
    except InvalidRequest as error:
        part = re.match(r"\w*", str(error))
        field = _PARTS.get(part.group() if part else "") if error.field == "chat" else None
        if field is None:
            raise
        raise InvalidRequest(re.sub(r"^\w+", field, str(error)), field) from error


def _turn(message: MessageBody, where: str) -> dict[str, Any]:
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{where} has tool_calls, which only an assistant makes", "messages")
    content = _content(message.content, where)
    if content is None and not message.tool_calls and message.refusal is None:
        raise InvalidRequest(f"{where} has no content", "messages")
    calls = [_call(call, where) for call in message.tool_calls or ()]
    return {
        "role": _TEMPLATE_ROLES.get(message.role, message.role),
        # Some templates join the content of a turn that has calls alone to a text. Source: vLLM
        "content": content if content is not None else message.refusal or "",
        **({"tool_calls": calls} if calls else {}),
        **{
            name: value
            for name in ("name", "tool_call_id", "reasoning_content", "reasoning")
            if (value := getattr(message, name)) is not None
        },
    }


def _content(content: str | list[ContentPart] | None, where: str) -> str | None:
    """Joins the parts of a content with line ends, as vLLM does for templates that take a text."""
    if content is None or isinstance(content, str):
        return content
    texts = [part.text if part.type == "text" else part.refusal for part in content]
    for index, text in enumerate(texts):
        if text is None:
            raise InvalidRequest(f"{where}.content[{index}] has no text", "messages")
    return "\n".join(text for text in texts if text is not None)


def _call(call: CalledTool, where: str) -> dict[str, Any]:
    text = call.function.arguments
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"{where} has a tool call whose arguments are no JSON: {inputs.shown(text)}", "messages"
        ) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where} has a tool call with the arguments {inputs.shown(text)}, a JSON object is needed", "messages"
        )
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
