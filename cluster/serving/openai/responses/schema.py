"""The bodies that `/v1/responses` takes. Source: OpenAI's API reference.

Nothing here answers for files, images, reasoning, or tools of OpenAI's own: these are refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from cluster.errors import InvalidRequest
from cluster.serving.openai.base_schema import GenerationFields
from cluster.serving.openai.body import RequestBody
from cluster.serving.openai.errors import BadBody
from cluster.types import MAX_TOP_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512  # OpenAI's
# The others are of what this server never answers with: they ask for nothing.
Include = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "reasoning.encrypted_content",
]


class InputText(RequestBody):
    type: Literal["input_text"]
    text: str


class OutputText(RequestBody):
    """annotations, logprobs: without effect."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(RequestBody):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]


class KnownItem(RequestBody):
    """Fields that an item has when it was an output. status, phase: without effect."""

    id: str | None = None
    status: str | None = None


class MessageItem(KnownItem):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: str | None = None


class CallItem(KnownItem):
    """A function that the assistant called. arguments: JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(KnownItem):
    """A called function's answer."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


def item_type(item: Any) -> Any:
    """A message may leave its type out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(item_type),
]
ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


class FunctionTool(RequestBody):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(RequestBody):
    type: Literal["function"]
    name: str


class PlainFormat(RequestBody):
    type: Literal["text"]


class ObjectFormat(RequestBody):
    type: Literal["json_object"]


class SchemaFormat(RequestBody):
    """strict: taken and without effect: every schema is kept to."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(RequestBody):
    format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseStreamOptions(RequestBody):
    """include_obfuscation: true is refused: events are not padded here."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(GenerationFields):
    """structured_outputs: vLLM's, as in chats.  In the last lines: without effect here."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Include] | None = None
    text: TextConfig | None = None
    structured_outputs: dict[str, Any] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    reasoning: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def check(self, *, keeps: bool) -> None:
        """keeps: whether this server keeps responses. Raises InvalidRequest for fields that do not go together."""
        if not keeps and (self.store or self.background):
            raise InvalidRequest("this server keeps no responses (stored_responses is 0)", "store")
        if any(value is not None for value in (self.reasoning or {}).values()):
            raise InvalidRequest("reasoning: this model has no reasoning apart from its answer", "reasoning")
        if self.background and not self.is_stored:
            raise InvalidRequest("background needs store: nobody could ask for the answer", "background")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is for streams: set stream to true", "stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(f"top_logprobs needs {LOGPROBS!r} in include", "top_logprobs")
        form = self.text.format if self.text is not None else None
        if self.structured_outputs is not None and form is not None and form.type != "text":
            raise BadBody("text and structured_outputs ask for a form each: give one", "text")
        self._check_metadata()

    def _check_metadata(self) -> None:
        given = self.metadata or {}
        if len(given) > MAX_METADATA:
            raise InvalidRequest(f"metadata has {len(given)} pairs, at most {MAX_METADATA} are allowed", "metadata")
        for key, value in given.items():
            if len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
                raise InvalidRequest(
                    f"metadata has a key of {len(key)} and a value of {len(value)} characters, at most "
                    f"{MAX_KEY_CHARS} and {MAX_VALUE_CHARS} are allowed",
                    "metadata",
                )
