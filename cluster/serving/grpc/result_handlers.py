"""The rpcs whose answers are numbers: results that a prompt has beside new tokens."""

from cluster.outcome import Wants
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc import messages, result_messages
from cluster.serving.grpc.answer_size import check_numbers, receive_limit
from cluster.serving.grpc.calls import GrpcCalls
from cluster.serving.grpc.context import GrpcContext, metadata_of

_SCORED_TOKEN_BYTES = 3 + 4  # an id below 2^21, and a float


class ResultHandlers(GrpcCalls):
    """A part of `GrpcInferenceService`."""

    async def Score(self, request: bytes, grpc_context: GrpcContext) -> pb.ScoreResponse:
        request_id = self._service.new_request_id()

        async def answer(message: pb.ScoreRequest, client: str) -> pb.ScoreResponse:
            limit = receive_limit(metadata_of(grpc_context))
            computed = await self._service.compute(
                messages.to_prompt(message),
                "token_logprobs",
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
                check=lambda num_tokens: check_numbers(num_tokens, _SCORED_TOKEN_BYTES, limit),
            )
            return result_messages.to_score_response(computed)

        types = pb.ScoreRequest, pb.ScoreResponse
        return await self._answer(request, grpc_context, *types, answer, request_id=request_id)

    async def Embed(self, request: bytes, grpc_context: GrpcContext) -> pb.EmbedResponse:
        request_id = self._service.new_request_id()

        async def answer(message: pb.EmbedRequest, client: str) -> pb.EmbedResponse:
            wants: Wants = "mean_hidden_state" if message.pooling == pb.POOLING_MEAN else "last_hidden_state"
            computed = await self._service.compute(
                messages.to_prompt(message),
                wants,
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
            )
            normalize = message.normalize if message.HasField("normalize") else True
            return result_messages.to_embed_response(computed, normalize=normalize)

        types = pb.EmbedRequest, pb.EmbedResponse
        return await self._answer(request, grpc_context, *types, answer, request_id=request_id)
