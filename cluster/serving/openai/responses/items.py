"""A body as a chat: the items that a conversation has so far, as messages. Knows no template."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import InvalidRequest
from cluster.serving.openai.base_schema import GenerationFields
from cluster.serving.openai.chat_schema import (
    CalledFunction,
    CalledTool,
    ChatRequest,
    FunctionBody,
    MessageBody,
    NamedTool,
    ToolBody,
)
from cluster.serving.openai.errors import BadBody
from cluster.serving.openai.forms import NamedSchema
from cluster.serving.openai.forms import ObjectFormat as ChatObjectFormat
from cluster.serving.openai.forms import SchemaFormat as ChatSchemaFormat
from cluster.serving.openai.responses.schema import (
    CallItem,
    CallOutputItem,
    InputText,
    Item,
    MessageItem,
    NamedFunction,
    ObjectFormat,
    OutputText,
    Part,
    ResponseRequest,
    SchemaFormat,
)

# A chat's names, and this API's.
_NAMES = {
    "messages": "input", "chat": "input", "max_tokens": "max_output_tokens", "response_format": "text",
}  # fmt: skip


def to_chat(body: ResponseRequest, items: Sequence[Item]) -> ChatRequest:
    """items: the whole conversation, oldest first. Raises InvalidRequest."""
    system = [] if body.instructions is None else [MessageBody(role="system", content=body.instructions)]
    return ChatRequest(
        messages=[*system, *to_messages(items)],
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        logprobs=body.wants_logprobs,
        top_logprobs=body.top_logprobs if body.wants_logprobs else None,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        structured_outputs=body.structured_outputs,
        **{name: getattr(body, name) for name in GenerationFields.model_fields},
    )


def to_messages(items: Sequence[Item]) -> list[MessageBody]:
    """An assistant's text and the calls after it are one turn; each call's answer is a turn of its own."""
    messages: list[MessageBody] = []
    for before, item in zip([None, *items], items, strict=False):
        match item:
            case MessageItem():
                messages.append(MessageBody(role=item.role, content=_text(item.content)))
            case CallItem():
                call = CalledTool(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if not _is_assistants(before):
                    messages.append(MessageBody(role="assistant"))
                messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
            case CallOutputItem():
                messages.append(MessageBody(role="tool", content=_text(item.output), tool_call_id=item.call_id))
    return messages


def _is_assistants(item: Item | None) -> bool:
    return isinstance(item, CallItem) or (isinstance(item, MessageItem) and item.role == "assistant")


def _text(content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, InputText | OutputText) else part.refusal for part in content)


def _tool(tool: Any) -> ToolBody:
    return ToolBody(type="function", function=FunctionBody(**tool.model_dump(exclude={"type"}, exclude_unset=True)))


def _tool_choice(body: ResponseRequest) -> Any:
    choice = body.tool_choice
    return NamedTool(type="function", function={"name": choice.name}) if isinstance(choice, NamedFunction) else choice


def _format(body: ResponseRequest) -> ChatObjectFormat | ChatSchemaFormat | None:
    match body.text.format if body.text is not None else None:
        case ObjectFormat():
            return ChatObjectFormat(type="json_object")
        case SchemaFormat() as form:
            return ChatSchemaFormat(type="json_schema", json_schema=NamedSchema(name=form.name, schema=form.schema_))
    return None


@contextmanager
def in_these_words() -> Iterator[None]:
    """Gives a refusal of the chat that was made of a body the names of the body's fields."""
    try:
        yield
    except InvalidRequest as error:
        name = _NAMES.get(error.field)
        if name is None:
            raise
        subject, _, rest = str(error).partition(" ")
        raise BadBody(f"{name} {rest}" if subject == error.field else f"{name}: {error}", name) from error
