"""A prompt's own text and log-probabilities, for `echo` and `prompt_logprobs`. Knows no HTTP."""

import asyncio
from collections.abc import Sequence

from cluster.serving.choices import Call
from cluster.serving.openai.answer_size import LOGPROB_BYTES, AnswerSize
from cluster.serving.openai.base_schema import PromptLogprob
from cluster.serving.openai.logprobs import LOWEST, TokenText
from cluster.serving.openai.several import a_few_at_a_time
from cluster.serving.prompt_tokens import PromptTokens
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt
from cluster.types import Logprobs


async def score(
    service: InferenceService, prompts: Sequence[Prompt], call: Call, num_top: int, *, param: str = "prompt_logprobs"
) -> list[PromptTokens]:
    """Computes each prompt's log-probabilities, with those of the `num_top` likeliest tokens.

    param: the field that asks for them.
    Raises ClusterError, the first that any meets; InvalidRequest where the answer would be too large.
    """

    size = AnswerSize(param, "send fewer tokens in a call, or ask for fewer likeliest ones")

    def check(num_tokens: int) -> None:
        size.add(num_tokens * (1 + num_top) * LOGPROB_BYTES)

    async def one(index: int, prompt: Prompt, goes_on: bool) -> PromptTokens:
        name = f"{call.request_id}-prompt-{index}"
        computed = await service.compute(
            prompt, "token_logprobs", request_id=name, client=call.client, num_top=max(1, num_top), check=check,
            goes_on=goes_on,
        )  # fmt: skip
        return await asyncio.to_thread(PromptTokens.of, computed, num_top)

    return await a_few_at_a_time(one, prompts, service.admission.at_a_time())


def prompt_logprobs(tokens: PromptTokens, text_of: TokenText) -> list[dict[str, PromptLogprob] | None]:
    """Of each token of a prompt: by its id, and by those of the likeliest ones. The first has none. Source: vLLM."""
    return [None, *(_entry(*pair, text_of) for pair in zip(tokens.entries, tokens.ranks, strict=True))]


def _entry(entry: Logprobs, rank: int, text_of: TokenText) -> dict[str, PromptLogprob]:
    found = {entry.token_id: (entry.logprob, rank)}
    for place, (token_id, logprob) in enumerate(entry.top, start=1):
        found.setdefault(token_id, (logprob, place))
    return {
        str(token_id): PromptLogprob(
            logprob=max(logprob, LOWEST), rank=rank, decoded_token=text_of(token_id).decode(errors="replace")
        )
        for token_id, (logprob, rank) in found.items()
    }
