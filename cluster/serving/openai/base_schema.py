"""Fields that several calls have, and how they become the parameters of a generation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.inputs import CONTINUED
from cluster.serving.choices import MAX_CHOICES
from cluster.serving.openai.body import AnswerBody as AnswerBody
from cluster.serving.openai.body import RequestBody as RequestBody
from cluster.serving.openai.forms import FormFields
from cluster.serving.openai.vllm_fields import VllmFields
from cluster.structured import StructuredOutputsParams
from cluster.types import MAX_TOP_LOGPROBS, SamplingParams, Usage

MAX_ID_DIGITS = 10
LOWEST_SEED = -(2**63)  # OpenAI's
SMALLEST_TOP_P = 1e-9  # the likeliest token alone, which OpenAI's API has 0 for


class StreamOptions(RequestBody):
    """include_obfuscation: true is refused: events are not padded here."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationFields(RequestBody):
    """How an answer's tokens are chosen, and where it ends. Those behind `seed` are vLLM's."""

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None


class SamplingFields(GenerationFields, FormFields, VllmFields):
    """The fields of a generation that chats and completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    continue_from: list[int] | list[list[int]] | None = None  # ours
    return_token_ids: bool | None = None  # vLLM's, as the next
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # Taken and without effect here: they name or steer what a server like this one does not have.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options is not None and self.stream_options.include_usage)

    @property
    def needs_token_ids(self) -> bool:
        """Whether the answer shows the prompt's tokens, or only some of them count."""
        return bool(self.return_token_ids) or (self.prompt_logprobs, self.truncate_prompt_tokens) != (None, None)

    def check(self) -> None:
        """Raises InvalidRequest for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is for streams: set stream to true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs come with a whole answer, not with a stream", "prompt_logprobs")
        if self.continue_from is not None and not self.stream:
            raise InvalidRequest(f"{CONTINUED} is for streams: set stream to true", CONTINUED)

    def continued(self, num_answers: int) -> list[tuple[int, ...]]:
        """Returns the tokens of each answer that its client has. Raises InvalidRequest for too few or too many."""
        given = self.continue_from or []
        lists = [each for each in given if isinstance(each, list)]
        if given and len(lists or [given]) != num_answers:
            found = f"{len(lists)} lists" if lists else "one list"
            raise InvalidRequest(
                f"{CONTINUED} has {found} of tokens, this call makes {num_answers} answers: a list for each is needed",
                CONTINUED,
            )
        tokens = lists or [[each for each in given if isinstance(each, int)]] * num_answers
        return [tuple(each) for each in tokens]

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, form: StructuredOutputsParams | None = None
    ) -> SamplingParams:
        """Of the first choice. form: that of the answer, in place of the one that the fields ask for.

        Raises InvalidRequest for a value out of range.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's word for all
            top_p=SMALLEST_TOP_P if self.top_p == 0 else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=_seed(self.seed),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            logit_bias=_biases(self.logit_bias or {}),
            structured_outputs=form or self.form(),
        )


def _seed(given: int | None) -> int | None:
    """OpenAI's seeds may be below zero; others that are out of range are refused later."""
    return given if given is None or not LOWEST_SEED <= given < 0 else given - LOWEST_SEED


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are texts. Raises InvalidRequest."""
    for key in given:
        if not key.isascii() or not key.isdigit() or len(key) > MAX_ID_DIGITS:
            raise InvalidRequest(f"logit_bias has the key {inputs.shown(key)}, a token id is needed", "logit_bias")
    return {int(key): value for key, value in given.items()}


class PromptLogprob(AnswerBody):
    """rank: from 1, among the whole vocabulary."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class UsageBody(AnswerBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]

    @classmethod
    def of(cls, usage: Usage) -> "UsageBody":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details={"cached_tokens": usage.cached_tokens},
        )
