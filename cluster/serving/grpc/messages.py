"""Protobuf messages to the project's types and back. Knows no network."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from cluster.errors import InvalidRequest
from cluster.outcome import HeadKind
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.chats import to_conversation
from cluster.serving.grpc.forms import message_form
from cluster.serving.grpc.tool_calls import AnswerCalls, GenerateMessage, chosen_form
from cluster.serving.text.prompts import Prompt
from cluster.types import (
    CompletionOutput,
    FinishReason,
    Logprobs,
    ModelInfo,
    SamplingParams,
    TextDelta,
    Usage,
)

_WithChat = pb.GenerateRequest | pb.GenerateStreamRequest | pb.ScoreRequest | pb.EmbedRequest | pb.ClassifyRequest
TimedMessage = _WithChat | pb.ClassifyTokensRequest | pb.AnswerSpanRequest
TimedRequest = TypeVar("TimedRequest", bound=TimedMessage)
_OPTIONAL_FIELDS = tuple(
    field.name for field in pb.SamplingParams.DESCRIPTOR.fields if field.has_presence and field.message_type is None
)
_FINISH_REASONS: dict[FinishReason | None, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    None: pb.FINISH_REASON_UNSPECIFIED,
}
_HEADS: dict[HeadKind, pb.Head] = {
    "causal_lm": pb.HEAD_CAUSAL_LM,
    "none": pb.HEAD_NONE,
    "sequence_classification": pb.HEAD_SEQUENCE_CLASSIFICATION,
    "token_classification": pb.HEAD_TOKEN_CLASSIFICATION,
    "question_answering": pb.HEAD_QUESTION_ANSWERING,
}


def to_prompt(message: TimedMessage | pb.TokenizeRequest) -> Prompt:
    """Raises InvalidRequest when the message has no input, or a conversation that no template takes."""
    field = message.WhichOneof("input")
    adapter = "" if isinstance(message, pb.TokenizeRequest) else message.adapter
    if field == "text":
        return Prompt(text=message.text, adapter=adapter)
    if field == "chat" and isinstance(message, _WithChat | pb.TokenizeRequest):
        return Prompt(chat=to_conversation(message.chat), adapter=adapter)
    if field == "token_ids" and not isinstance(message, pb.TokenizeRequest):
        return Prompt(token_ids=tuple(message.token_ids.ids), adapter=adapter)
    return Prompt()


def to_question(message: GenerateMessage) -> tuple[Prompt, SamplingParams]:
    """Both at once. Raises InvalidRequest."""
    prompt = to_prompt(message)
    if isinstance(message, pb.GenerateStreamRequest) and message.continue_from:
        prompt = replace(prompt, continue_from=tuple(message.continue_from))
    return prompt, to_params(message)


def to_params(message: GenerateMessage) -> SamplingParams:
    """With the form of the calls that the request's tool_choice asks for. Raises InvalidRequest."""
    params = to_sampling_params(message.sampling_params)
    form = chosen_form(message, message_form(message.sampling_params))
    return params if form is None else replace(params, structured_outputs=form)


def to_sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest for a value out of range."""
    given = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        structured_outputs=message_form(message),
        **given,
    )


def to_timeout_s(message: TimedMessage) -> float | None:
    """Returns the time budget, None for no bound. Raises InvalidRequest for 0."""
    if not message.HasField("timeout_ms"):
        return None
    if message.timeout_ms == 0:
        raise InvalidRequest("timeout_ms is 0, it must be at least 1", "timeout_ms")
    return message.timeout_ms / 1000


def to_generate_response(output: CompletionOutput, calls: AnswerCalls) -> pb.GenerateResponse:
    text, _ = calls.read(output.text, output.finish_reason)
    return pb.GenerateResponse(
        request_id=output.request_id,
        text=text,
        tool_calls=calls.calls(),
        token_ids=output.token_ids,
        logprobs=[_to_logprobs(logprobs) for logprobs in output.logprobs],
        finish_reason=_finish_reason(output.finish_reason, calls),
        usage=_to_usage(output.usage),
    )


def to_stream_response(
    delta: TextDelta, calls: AnswerCalls, request_id: str = "", num_continued: int = 0
) -> pb.GenerateStreamResponse:
    """request_id, num_continued: given for the first message of a stream only."""
    if delta.text_before:
        calls.read(delta.text_before, None)  # its client has what that says
    text, pieces = calls.read(delta.text, delta.finish_reason)
    return pb.GenerateStreamResponse(
        request_id=request_id,
        num_continued=num_continued,
        text=text,
        tool_calls=pieces,
        token_ids=delta.token_ids,
        logprobs=[_to_logprobs(logprobs) for logprobs in delta.logprobs],
        finish_reason=_finish_reason(delta.finish_reason, calls),
        usage=None if delta.usage is None else _to_usage(delta.usage),
    )


def to_model_info_response(info: ModelInfo, adapters: Iterable[str] = ()) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        model_id=info.model_id,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        num_hidden_layers=info.num_hidden_layers,
        num_experts=info.num_experts,
        num_experts_per_tok=info.num_experts_per_tok,
        dtype=info.dtype,
        eos_token_ids=info.eos_token_ids,
        head=_HEADS[info.head.kind],
        labels=info.head.labels,
        adapters=sorted(adapters),
    )


def _finish_reason(reason: FinishReason | None, calls: AnswerCalls) -> pb.FinishReason:
    return pb.FINISH_REASON_TOOL_CALLS if calls.end_there(reason) else _FINISH_REASONS[reason]


def _to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _to_logprobs(logprobs: Logprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return pb.TokenLogprobs(token_id=logprobs.token_id, logprob=logprobs.logprob, top=top)
