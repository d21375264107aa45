"""The events of a stream of `/v1/messages`. Source: Anthropic's API reference, "Streaming messages"."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, RootModel

from cluster.serving.openai.base_schema import AnswerBody
from cluster.serving.openai.messages_schema import MessageAnswer, MessagesUsage


class _Part(AnswerBody):
    """Has these fields and no others: the OpenAPI document says so."""

    model_config = ConfigDict(extra="forbid")


class StartedText(_Part):
    type: Literal["text"] = "text"
    text: str = ""


class StartedToolUse(_Part):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = Field(default_factory=dict)


class TextDelta(_Part):
    type: Literal["text_delta"] = "text_delta"
    text: str


class InputJsonDelta(_Part):
    """partial_json: to append to the block's input, a JSON object when the block is complete."""

    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class MessageEnd(_Part):
    stop_reason: str
    stop_sequence: str | None


class MessageStart(_Part):
    """message: without content; its usage has the prompt's tokens."""

    type: Literal["message_start"] = "message_start"
    message: MessageAnswer


class ContentBlockStart(_Part):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Annotated[StartedText | StartedToolUse, Field(discriminator="type")]


class ContentBlockDelta(_Part):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: Annotated[TextDelta | InputJsonDelta, Field(discriminator="type")]


class ContentBlockStop(_Part):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class MessageDelta(_Part):
    type: Literal["message_delta"] = "message_delta"
    delta: MessageEnd
    usage: MessagesUsage


class MessageStop(_Part):
    type: Literal["message_stop"] = "message_stop"


OneEvent = MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop


class MessageEvent(RootModel[Annotated[OneEvent, Field(discriminator="type")]]):
    """One event of a message, for the OpenAPI document."""
