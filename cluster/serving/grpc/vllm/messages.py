"""Messages of `vllm.grpc.engine` to the project's types and back. Knows no network."""

from collections.abc import Sequence
from typing import Any

from cluster.errors import InvalidRequest
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as pb
from cluster.serving.choices import MAX_CHOICES, Choice
from cluster.serving.prompt_tokens import PromptTokens
from cluster.serving.text.prompts import Prompt
from cluster.structured import StructuredOutputsParams
from cluster.types import MAX_TOP_LOGPROBS, Logprobs, SamplingParams, TextDelta

_REFUSED = {  # fields of a request, and the reason
    "kv_transfer_params": "prompts are computed where their answers are",
    "kv_transfer_params_json": "prompts are computed where their answers are",
    "mm_inputs": "the model takes text alone",
    "extra_mm_inputs": "the model takes text alone",
    "media_refs": "the model takes text alone",
}
_WITHOUT_PRESENCE = ("min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos", "top_k")
_OPTIONAL = ("max_tokens", "logprobs", "seed")


def to_prompt(message: pb.GenerateRequest) -> Prompt:
    """Raises InvalidRequest for none, and for a field that cannot be met."""
    set_fields = {field.name for field, _ in message.ListFields()}
    for name, reason in _REFUSED.items():
        if name in set_fields:
            raise InvalidRequest(f"{name} is set, which this server cannot meet: {reason}", name)
    check_rank(message, "data_parallel_rank")
    if message.WhichOneof("input") == "text":
        return Prompt(text=message.text)
    if message.WhichOneof("input") == "tokenized":
        return Prompt(token_ids=tuple(message.tokenized.input_ids))
    raise InvalidRequest("input is empty, one of tokenized and text is needed", "input")


def check_rank(message: Any, name: str) -> None:
    """Raises InvalidRequest for a rank that is not there."""
    if message.HasField(name) and getattr(message, name) != 0:
        raise InvalidRequest(
            f"{name} is {getattr(message, name)}: the cluster is one engine, and balances by itself; leave it out", name
        )


def num_choices(message: pb.SamplingParams) -> int:
    """Raises InvalidRequest."""
    if message.n > MAX_CHOICES:
        raise InvalidRequest(f"n is {message.n}, at most {MAX_CHOICES} are allowed", "n")
    return message.n or 1


def num_prompt_top(message: pb.SamplingParams) -> int | None:
    """Returns how many likeliest tokens of each of the prompt's are wanted, None for no log-probabilities of it.

    Raises InvalidRequest.
    """
    if not message.HasField("prompt_logprobs"):
        return None
    if not 0 <= message.prompt_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs is {message.prompt_logprobs}, 0 to {MAX_TOP_LOGPROBS} are possible", "prompt_logprobs"
        )
    return message.prompt_logprobs


def to_params(message: pb.SamplingParams) -> SamplingParams:
    """Numbers without presence are as they stand, as in vLLM: nothing of generation_config.json comes in their place.

    Raises InvalidRequest for a value out of range, and for a field that cannot be met.
    """
    if message.HasField("truncate_prompt_tokens"):
        name = "truncate_prompt_tokens"
        raise InvalidRequest(f"{name} is set, which this call cannot meet: leave it out", name)
    given: dict[str, Any] = {name: getattr(message, name) for name in _WITHOUT_PRESENCE}
    given |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    return SamplingParams(
        **given,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p or 1.0,
        repetition_penalty=message.repetition_penalty or 1.0,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        structured_outputs=_to_form(message),
    )


def _to_form(message: pb.SamplingParams) -> StructuredOutputsParams | None:
    match message.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutputsParams(json=message.json_schema)
        case "regex":
            return StructuredOutputsParams(regex=message.regex)
        case "grammar":
            return StructuredOutputsParams(grammar=message.grammar)
        case "choice":
            return StructuredOutputsParams(choice=tuple(message.choice.choices))
        case "json_object":
            return StructuredOutputsParams(json_object=True) if message.json_object else None
        case "structural_tag":
            raise InvalidRequest("structural_tag is set: give a grammar, or the JSON schema of the calls", "constraint")
    return None


def to_input_logprobs(prompt: PromptTokens) -> pb.InputLogProbs:
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb(), *(pb.InputTokenLogProb(value=one.logprob) for one in prompt.entries)],
        token_ids=prompt.token_ids,
        top_logprobs=[pb.TopLogProbs(), *(_to_top(one) for one in prompt.entries)],
    )


def to_chunk(
    delta: TextDelta,
    choice: Choice,
    index: int,
    input_logprobs: pb.InputLogProbs | None = None,
) -> pb.GenerateResponse:
    """choice: the answer with the delta in it."""
    return pb.GenerateResponse(
        chunk=pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=choice.prompt_tokens,
            completion_tokens=len(choice.token_ids),
            cached_tokens=choice.cached_tokens,
            output_logprobs=_to_logprobs(delta.logprobs),
            input_logprobs=input_logprobs,
            index=index,
        )
    )


def to_complete(
    choice: Choice,
    params: SamplingParams,
    index: int,
    *,
    logprobs: bool = True,
    input_logprobs: pb.InputLogProbs | None = None,
    aborted: bool = False,
) -> pb.GenerateResponse:
    """The end of an answer. logprobs, input_logprobs: where no chunk had them."""
    complete = pb.GenerateComplete(
        output_ids=choice.token_ids,
        finish_reason="abort" if aborted else choice.finish_reason or "error",
        prompt_tokens=choice.prompt_tokens,
        completion_tokens=len(choice.token_ids),
        cached_tokens=choice.cached_tokens,
        output_logprobs=_to_logprobs(choice.logprobs) if logprobs else None,
        input_logprobs=input_logprobs,
        index=index,
    )
    if not aborted and choice.matched_stop is not None:
        complete.matched_stop_str = choice.matched_stop
    elif not aborted and choice.finish_reason == "stop" and choice.token_ids[-1] in params.stop_token_ids:
        complete.matched_token_id = choice.token_ids[-1]
    return pb.GenerateResponse(complete=complete)


def _to_logprobs(entries: Sequence[Logprobs]) -> pb.OutputLogProbs | None:
    if not entries:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in entries],
        token_ids=[entry.token_id for entry in entries],
        top_logprobs=[_to_top(entry) for entry in entries],
    )


def _to_top(entry: Logprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=[p for _, p in entry.top], token_ids=[token_id for token_id, _ in entry.top])
