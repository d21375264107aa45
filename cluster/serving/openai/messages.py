"""`/v1/messages` and its `count_tokens`: Anthropic's API for the same conversations."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest
from cluster.serving.choices import Call, Choice, collect
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.chat import PreparedChat, prepared
from cluster.serving.openai.chat_schema import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatRequest,
    FunctionBody,
    MessageBody,
    NamedTool,
    ToolBody,
)
from cluster.serving.openai.conversations import check_length, to_conversation
from cluster.serving.openai.errors import AnthropicError, anthropic_body
from cluster.serving.openai.forms import naming
from cluster.serving.openai.message_reader import reader_for
from cluster.serving.openai.messages_events import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageStart,
    MessageStop,
    OneEvent,
    StartedText,
    StartedToolUse,
    TextDelta,
)
from cluster.serving.openai.messages_schema import (
    CountTokensRequest,
    MessageAnswer,
    MessagesRequest,
    MessagesUsage,
    TextBlock,
    TokenCount,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import begun, event_text, streamed
from cluster.serving.text.prompts import Prompt
from cluster.types import Usage

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["messages"], route_class=BodyRoute)

    @routes.post("/v1/messages", response_model=MessageAnswer, responses=streamed(MessageEvent, AnthropicError))
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        served.adapter_of(body.model)
        call = Call(request_id=f"msg_{request.state.request_id}", client=request.state.client)
        with naming("tools"):
            chat = await prepared(served, _to_chat(body), call)
            if body.stream:
                return await begun(_stream(chat), call.request_id, _error_event)
            return Response((await _answer(chat)).model_dump_json(), media_type="application/json")

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, request: Request) -> TokenCount:
        served.adapter_of(body.model)
        prompt = Prompt(chat=to_conversation(ChatRequest(**_prompt_fields(body))))
        return TokenCount(input_tokens=len(await served.service.tokenize(prompt, request.state.client)))

    return routes


def _to_chat(body: MessagesRequest) -> ChatRequest:
    """The same request in OpenAI's words. Raises InvalidRequest."""
    return ChatRequest(
        **_prompt_fields(body),
        model=body.model,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )


def _prompt_fields(body: CountTokensRequest) -> dict[str, Any]:
    messages = [] if body.system is None else [MessageBody(role="system", content=_text(body.system))]
    check_length(len(body.messages))  # before each becomes one message or more
    for index, turn in enumerate(body.messages):
        messages += _turns(turn, f"messages[{index}]")
    tools = [
        ToolBody(
            type="function",
            function=FunctionBody(name=tool.name, description=tool.description, parameters=tool.input_schema),
        )
        for tool in body.tools or ()
    ]
    choice = _tool_choice(body.tool_choice)
    parallel = None if body.tool_choice is None else body.tool_choice.disable_parallel_tool_use
    return {
        "messages": messages,
        # An answer that is begun is gone on with.
        **({"continue_final_message": True} if messages and messages[-1].role == "assistant" else {}),
        **({"tools": tools} if tools else {}),
        **({"tool_choice": choice} if choice is not None else {}),
        **({"parallel_tool_calls": not parallel} if parallel is not None else {}),
    }


def _turns(turn: Turn, where: str) -> list[MessageBody]:
    """A turn in OpenAI's words: each result of a tool is a turn of its own, before the text beside it."""
    if isinstance(turn.content, str):
        return [MessageBody(role=turn.role, content=turn.content)]
    texts = [block for block in turn.content if isinstance(block, TextBlock)]
    calls = [block for block in turn.content if isinstance(block, ToolUseBlock)]
    results = [block for block in turn.content if isinstance(block, ToolResultBlock)]
    if (calls and turn.role != "assistant") or (results and turn.role != "user"):
        raise InvalidRequest(
            f"{where} is the {turn.role}'s: only an assistant calls a tool, a user answers", "messages"
        )
    found = [
        MessageBody(role="tool", content=_text(result.content or ""), tool_call_id=result.tool_use_id)
        for result in results
    ]
    if texts or calls or not results:
        called = [
            CalledTool(id=call.id, function=CalledFunction(name=call.name, arguments=json.dumps(call.input)))
            for call in calls
        ]
        content = _text(texts) if texts or not calls else None
        found.append(MessageBody(role=turn.role, content=content, tool_calls=called or None))
    return found


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise InvalidRequest("tool_choice of type tool needs a name", "tool_choice")
    return NamedTool(type="function", function={"name": choice.name})


async def _answer(chat: PreparedChat) -> MessageAnswer:
    """Raises ClusterError."""
    [choice] = await collect(chat.deltas, 1)
    reader = reader_for(chat.body)
    reader.read(choice.text)
    reader.end()
    message = reader.whole()
    content: list[dict[str, Any]] = [{"type": "text", "text": message.content}] if message.content else []
    for call in message.tool_calls or ():
        function = call["function"]
        found = {
            "type": "tool_use",
            "id": call["id"],
            "name": function["name"],
            "input": _object(function["arguments"]),
        }
        content.append(found)
    return MessageAnswer(
        id=chat.call.request_id,
        model=chat.served.shown_model(chat.body.model),
        content=content,
        stop_reason=_stop_reason(choice, called=bool(message.tool_calls)),
        stop_sequence=choice.matched_stop,
        usage=MessagesUsage.of(choice.usage),
    )


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; an answer that was cut may have half of them, and gives none."""
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _stop_reason(choice: Choice, *, called: bool) -> str:
    if choice.finish_reason == "length":
        return "max_tokens"
    if called:
        return "tool_use"
    return "end_turn" if choice.matched_stop is None else "stop_sequence"


class _Blocks:
    """The content blocks of a stream: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self.called = False

    def add(self, part: AnswerMessage) -> list[str]:
        """Returns the events that a part of the message brings."""
        events: list[str] = []
        if part.content:
            events += self._begin(StartedText()) if self._open != "text" else []
            events.append(self._delta(TextDelta(text=part.content)))
        for call in part.tool_calls or ():
            function = call.get("function", {})
            if function.get("name"):
                self.called = True
                events += self._begin(StartedToolUse(id=call["id"], name=function["name"]))
            if function.get("arguments"):
                events.append(self._delta(InputJsonDelta(partial_json=function["arguments"])))
        return events

    def end(self) -> list[str]:
        """Returns the events that close the open block."""
        closing = [_event(ContentBlockStop(index=self._index))] if self._open else []
        self._open = ""
        return closing

    def _begin(self, block: StartedText | StartedToolUse) -> list[str]:
        closing = self.end()
        self._index, self._open = self._index + 1, block.type
        return [*closing, _event(ContentBlockStart(index=self._index, content_block=block))]

    def _delta(self, delta: TextDelta | InputJsonDelta) -> str:
        return _event(ContentBlockDelta(index=self._index, delta=delta))


async def _stream(chat: PreparedChat) -> AsyncGenerator[str, None]:
    """Yields the events of a message, the first of them when its first token is there."""
    reader, choice, blocks, begun_ = reader_for(chat.body), Choice(), _Blocks(), False
    async with aclosing(chat.deltas):
        async for _, delta in chat.deltas:
            if not begun_:
                begun_ = True
                prompt = Usage(
                    prompt_tokens=delta.prompt_tokens, completion_tokens=0, cached_tokens=delta.cached_tokens
                )
                yield _event(MessageStart(message=_started(chat, prompt)))
            choice.add(delta)
            parts = reader.read(delta.text)
            if delta.finish_reason is not None:
                parts += reader.end()
            for part in parts:
                for text in blocks.add(part):
                    yield text
    for text in blocks.end():
        yield text
    reason = _stop_reason(choice, called=blocks.called)
    end = MessageEnd(stop_reason=reason, stop_sequence=choice.matched_stop)
    yield _event(MessageDelta(delta=end, usage=MessagesUsage.of(choice.usage)))
    yield _event(MessageStop())


def _started(chat: PreparedChat, prompt: Usage) -> MessageAnswer:
    """The message before its first token; the number of its own tokens comes with the last event."""
    return MessageAnswer(
        id=chat.call.request_id,
        model=chat.served.shown_model(chat.body.model),
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=MessagesUsage.of(prompt),
    )


def _event(data: OneEvent) -> str:
    return event_text(data.model_dump_json(), data.type)


def _error_event(error: Exception, request_id: str) -> str:
    return event_text(json.dumps(anthropic_body(error, request_id)), "error")
