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

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from cluster.errors import ClusterError, InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc import messages
from cluster.serving.grpc.answer_size import check_after, check_before, receive_limit
from cluster.serving.grpc.context import GrpcContext, fail_stream, metadata_of, peer_of, set_status
from cluster.serving.service import InferenceService

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class GrpcInferenceService:
    """A mixin of the ingress deployment: one method an rpc, taking the request's bytes. Not thread-safe.

    raise_failures: a stream that failed must end with an exception (see above).
    """

    def __init__(self, service: InferenceService, *, raise_failures: bool = True) -> None:
        self._service = service
        self._raise_failures = raise_failures

    def lets_in(self, context: GrpcContext) -> bool:
        """Returns whether a call's message may be read; sets the call's status if not. Counts only the refusal."""
        try:
            self._service.admission.identify(metadata_of(context), peer_of(context))
        except ClusterError as error:
            self._service.count_refused(error)
            set_status(context, error)
            return False
        return True

    async def Generate(self, request: bytes, grpc_context: GrpcContext) -> pb.GenerateResponse:
        request_id = self._service.new_request_id()

        async def answer(message: pb.GenerateRequest, client: str) -> pb.GenerateResponse:
            limit = receive_limit(metadata_of(grpc_context))
            output = await self._service.generate(
                messages.to_prompt(message),
                messages.to_sampling_params(message.sampling_params),
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
                check=lambda params: check_before(params, limit),
            )
            return messages.to_generate_response(output)

        types = pb.GenerateRequest, pb.GenerateResponse
        return await self._answer(request, grpc_context, *types, answer, request_id=request_id)

    async def GenerateStream(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        request_id = self._service.new_request_id()
        try:
            with self._counted(grpc_context) as client:
                message = self._parse(request, pb.GenerateStreamRequest)
                request_id = message.request_id or request_id
                first_id = request_id
                stream = self._service.stream(
                    messages.to_prompt(message),
                    messages.to_sampling_params(message.sampling_params),
                    request_id=request_id,
                    timeout_s=messages.to_timeout_s(message),
                    client=client,
                )
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        yield messages.to_stream_response(delta, first_id)
                        first_id = ""
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            if self._raise_failures:
                fail_stream(grpc_context, error, request_id)
            set_status(grpc_context, error, request_id)

    async def Tokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.TokenizeResponse:
        async def answer(message: pb.TokenizeRequest, client: str) -> pb.TokenizeResponse:
            token_ids = await self._service.tokenize(messages.to_prompt(message), client)
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._service.info.max_model_len)

        return await self._answer(request, grpc_context, pb.TokenizeRequest, pb.TokenizeResponse, answer)

    async def Detokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.DetokenizeResponse:
        async def answer(message: pb.DetokenizeRequest, client: str) -> pb.DetokenizeResponse:
            skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
            ids = tuple(message.token_ids)
            text = await self._service.detokenize(ids, skip_special_tokens=skip, client=client)
            return pb.DetokenizeResponse(text=text)

        return await self._answer(request, grpc_context, pb.DetokenizeRequest, pb.DetokenizeResponse, answer)

    async def GetModelInfo(self, request: bytes, grpc_context: GrpcContext) -> pb.GetModelInfoResponse:
        async def answer(_: pb.GetModelInfoRequest, __: str) -> pb.GetModelInfoResponse:
            return messages.to_model_info_response(self._service.info)

        return await self._answer(request, grpc_context, pb.GetModelInfoRequest, pb.GetModelInfoResponse, answer)

    async def _answer(
        self,
        request: bytes,
        context: GrpcContext,
        request_type: type[Request],
        response_type: type[Response],
        answer: Callable[[Request, str], Awaitable[Response]],
        *,
        request_id: str = "",
    ) -> Response:
        """Parses and answers a unary request; a failed one gets a status and an empty response.

        answer: takes the message and the client.
        """
        request_id = request_id or self._service.new_request_id()
        try:
            with self._counted(context) as client:
                message = self._parse(request, request_type)
                request_id = getattr(message, "request_id", "") or request_id
                response = await answer(message, client)
                check_after(response.ByteSize(), receive_limit(metadata_of(context)))
                return response
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            set_status(context, error, request_id)
            return response_type()

    @contextmanager
    def _counted(self, context: GrpcContext) -> Iterator[str]:
        """Counts a call while it is open; yields its client. Raises Forbidden, Unauthenticated, Overloaded."""
        with ExitStack() as counted:
            try:
                client = counted.enter_context(self._service.admission.call(metadata_of(context), peer_of(context)))
            except ClusterError as error:
                self._service.count_refused(error)
                raise
            yield client

    def _parse(self, request: bytes, request_type: type[Request]) -> Request:
        limit = self._service.limits.max_request_bytes
        if len(request) > limit:
            raise InvalidRequest(f"the request has {len(request)} bytes, at most {limit} are allowed", "request")
        try:
            return request_type.FromString(request)
        except DecodeError as error:
            raise InvalidRequest(f"the request cannot be read: {error}", "request") from error
