"""The bodies of `/v1/completions`. Source: OpenAI's API reference of the legacy call."""

from typing import Annotated

from pydantic import Field

from cluster.serving.choices import MAX_CHOICES
from cluster.serving.openai.base_schema import AnswerBody, PromptLogprobs, SamplingFields, UsageBody
from cluster.serving.openai.prompts import Prompts
from cluster.types import MAX_TOP_LOGPROBS


class CompletionRequest(SamplingFields):
    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None


class CompletionLogprobs(AnswerBody):
    """Each list has an entry for each token. text_offset: in characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerBody):
    """stop_reason: vLLM's; the stop string that ended it, left out for another end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(AnswerBody):
    """Whole, or a chunk of a stream: OpenAI's have one shape."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
