"""The rpcs whose answers are numbers: results that a prompt has beside new tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from cluster.outcome import Computed, Head, Wants
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc import messages, result_messages
from cluster.serving.grpc.answer_size import check_numbers, receive_limit
from cluster.serving.grpc.calls import GrpcCalls, Response
from cluster.serving.grpc.context import GrpcContext, metadata_of
from cluster.serving.grpc.messages import TimedRequest

_ID_BYTES, _FLOAT_BYTES = 3, 4  # of an id below 2^21, and of a number


@dataclass(frozen=True, slots=True)
class _Rpc(Generic[TimedRequest, Response]):
    """One of these rpcs. token_bytes: of the answer, for each token of the prompt, with a head."""

    request: type[TimedRequest]
    response: type[Response]
    wants: Callable[[TimedRequest], Wants]
    respond: Callable[[Computed, TimedRequest, Head], Response]
    token_bytes: Callable[[Head], int] = lambda head: 0


_SCORE = _Rpc(
    pb.ScoreRequest,
    pb.ScoreResponse,
    lambda message: "token_logprobs",
    result_messages.to_score_response,
    lambda head: _ID_BYTES + _FLOAT_BYTES,
)
_EMBED = _Rpc(
    pb.EmbedRequest,
    pb.EmbedResponse,
    lambda message: "mean_hidden_state" if message.pooling == pb.POOLING_MEAN else "last_hidden_state",
    result_messages.to_embed_response,
)
_CLASSIFY = _Rpc(
    pb.ClassifyRequest,
    pb.ClassifyResponse,
    lambda message: "label_logits",
    result_messages.to_classify_response,
)
_CLASSIFY_TOKENS = _Rpc(
    pb.ClassifyTokensRequest,
    pb.ClassifyTokensResponse,
    lambda message: "token_label_logits",
    result_messages.to_classify_tokens_response,
    lambda head: 2 * _ID_BYTES + _FLOAT_BYTES * len(head.labels),
)
_ANSWER_SPAN = _Rpc(
    pb.AnswerSpanRequest,
    pb.AnswerSpanResponse,
    lambda message: "span_logits",
    result_messages.to_answer_span_response,
    lambda head: _ID_BYTES + 2 * _FLOAT_BYTES,
)


class ResultHandlers(GrpcCalls):
    """A part of `GrpcInferenceService`."""

    async def Score(self, request: bytes, grpc_context: GrpcContext) -> pb.ScoreResponse:
        return await self._compute(request, grpc_context, _SCORE)

    async def Embed(self, request: bytes, grpc_context: GrpcContext) -> pb.EmbedResponse:
        return await self._compute(request, grpc_context, _EMBED)

    async def Classify(self, request: bytes, grpc_context: GrpcContext) -> pb.ClassifyResponse:
        return await self._compute(request, grpc_context, _CLASSIFY)

    async def ClassifyTokens(self, request: bytes, grpc_context: GrpcContext) -> pb.ClassifyTokensResponse:
        return await self._compute(request, grpc_context, _CLASSIFY_TOKENS)

    async def AnswerSpan(self, request: bytes, grpc_context: GrpcContext) -> pb.AnswerSpanResponse:
        return await self._compute(request, grpc_context, _ANSWER_SPAN)

    async def _compute(self, request: bytes, context: GrpcContext, rpc: _Rpc[TimedRequest, Response]) -> Response:
        request_id, head = self._service.new_request_id(), self._service.info.head

        async def answer(message: TimedRequest, client: str) -> Response:
            limit = receive_limit(metadata_of(context))
            prompt = await self._beside(request, lambda: messages.to_prompt(message), client)
            computed = await self._service.compute(
                prompt,
                rpc.wants(message),
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
                check=lambda num_tokens: check_numbers(num_tokens, rpc.token_bytes(head), limit),
            )
            response = rpc.respond(computed, message, head)
            if isinstance(response, pb.AnswerSpanResponse) and self._service.has_text:
                found = computed.prompt_token_ids[response.start : response.end + 1]
                response.text = await self._service.detokenize(found, client=client)
            return response

        return await self._answer(request, context, rpc.request, rpc.response, answer, request_id=request_id)
