"""The gRPC handlers of `moecluster.v1.InferenceService`, for Ray Serve's ingress; they decide nothing.

Serve's proxy owns the port. It calls `add_inference_service` at its start, then hands each request's bytes to the
ingress deployment's method of the rpc's name, with a `grpc_context`. Requests are parsed here, not in the proxy: so a
broken or an oversized one gets INVALID_ARGUMENT with a reason. Where API keys are asked for, nothing of a request
without one is parsed; health and reflection are for everybody.

How an error reaches the client (Ray Serve 2.60, both proxies):
    unary    code and details set on the context, and any message returned. Raising works too, but Serve then
             logs a traceback for every bad request.
    stream   code and details set, and an exception raised: the default proxy learns of the context only with
             a message or an exception, so that a stream that just ends would look like a success. Behind HAProxy
             the context is the server's own: the stream just ends, and Serve logs no traceback.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc import messages
from cluster.serving.grpc.answer_size import check_before, receive_limit
from cluster.serving.grpc.context import GrpcContext, fail_stream, metadata_of, set_status
from cluster.serving.grpc.result_handlers import ResultHandlers
from cluster.serving.grpc.tool_calls import AnswerCalls


class GrpcInferenceService(ResultHandlers):
    """A mixin of the ingress deployment: one method an rpc, taking the request's bytes. Not thread-safe.

    raise_failures: a stream that failed must end with an exception (see above).
    """

    async def Generate(self, request: bytes, grpc_context: GrpcContext) -> pb.GenerateResponse:
        request_id = self._service.new_request_id()

        async def answer(message: pb.GenerateRequest, client: str) -> pb.GenerateResponse:
            limit = receive_limit(metadata_of(grpc_context))
            prompt, params = await self._beside(request, lambda: messages.to_question(message), client)
            output = await self._service.generate(
                prompt,
                params,
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
                check=lambda params: check_before(params, limit),
            )
            return messages.to_generate_response(output, AnswerCalls(message))

        types = pb.GenerateRequest, pb.GenerateResponse
        return await self._answer(request, grpc_context, *types, answer, request_id=request_id)

    async def GenerateStream(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        request_id = self._service.new_request_id()
        try:
            with self._counted(grpc_context, pb.GenerateStreamRequest) as client:
                message = await self._beside(request, lambda: self._parse(request, pb.GenerateStreamRequest), client)
                request_id = message.request_id or request_id
                first_id, num_continued = request_id, len(message.continue_from)
                prompt, params = await self._beside(request, lambda: messages.to_question(message), client)
                stream = self._service.stream(
                    prompt,
                    params,
                    request_id=request_id,
                    timeout_s=messages.to_timeout_s(message),
                    client=client,
                )
                calls = AnswerCalls(message)
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        yield messages.to_stream_response(delta, calls, first_id, num_continued)
                        first_id, num_continued = "", 0
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            if self._raise_failures:
                fail_stream(grpc_context, error, request_id)
            set_status(grpc_context, error, request_id)

    async def Tokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.TokenizeResponse:
        async def answer(message: pb.TokenizeRequest, client: str) -> pb.TokenizeResponse:
            prompt = await self._beside(request, lambda: messages.to_prompt(message), client)
            token_ids = await self._service.tokenize(prompt, client)
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._service.info.max_model_len)

        return await self._answer(request, grpc_context, pb.TokenizeRequest, pb.TokenizeResponse, answer)

    async def Detokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.DetokenizeResponse:
        async def answer(message: pb.DetokenizeRequest, client: str) -> pb.DetokenizeResponse:
            skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
            ids = await self._beside(request, lambda: tuple(message.token_ids), client)
            text = await self._service.detokenize(ids, skip_special_tokens=skip, client=client)
            return pb.DetokenizeResponse(text=text)

        return await self._answer(request, grpc_context, pb.DetokenizeRequest, pb.DetokenizeResponse, answer)

    async def GetModelInfo(self, request: bytes, grpc_context: GrpcContext) -> pb.GetModelInfoResponse:
        async def answer(_: pb.GetModelInfoRequest, __: str) -> pb.GetModelInfoResponse:
            return messages.to_model_info_response(self._service.info, self._service.adapters())

        return await self._answer(request, grpc_context, pb.GetModelInfoRequest, pb.GetModelInfoResponse, answer)
