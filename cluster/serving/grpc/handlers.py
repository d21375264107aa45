"""The gRPC handlers of `moecluster.v1.InferenceService`, for Ray Serve's ingress; they decide nothing.

Serve's proxy owns the port. It calls `add_inference_service` at its start, then hands each request's bytes
to the ingress deployment's method of the rpc's name, with a `grpc_context`. Parsing here, not in the proxy,
is what makes a broken or an oversized request an INVALID_ARGUMENT with a reason. Where API keys are asked for, nothing
of a request without one is parsed; health and reflection are for everybody.

How an error reaches the client (Ray Serve 2.60, both proxies):
    unary    code and details set on the context, and any message returned. Raising works too, but Serve then
             logs a traceback for every bad request.
    stream   code and details set, and an exception raised: the default proxy learns of the context only with
             a message or an exception, so that a stream that just ends would look like a success. Behind HAProxy
             the context is the server's own: the stream just ends, and Serve logs no traceback.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.errors import ClusterError, InvalidRequest, Overloaded
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.admission.callers import Callers
from cluster.serving.grpc import messages
from cluster.serving.grpc.answer_size import check_after, receive_limit
from cluster.serving.service import InferenceService

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_DETAILS_CHARS = 1000
MAX_DETAILS_BYTES = 2000  # gRPC writes a byte that is not ASCII as three; 8 KB of trailers is the limit

RETRY_KEY = "grpc-retry-pushback-ms"  # gRPC's own name for it: clients with a retry policy follow it by themselves

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class GrpcContext(Protocol):
    """The part of Serve's `RayServegRPCContext` that is used here."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...

    def peer(self) -> str: ...


class StreamFailed(Exception):
    """Ends a stream whose context has its code and details already; the message is the details."""


class GrpcInferenceService:
    """A mixin of the ingress deployment: one method an rpc, taking the request's bytes. Not thread-safe.

    callers: who may call; else everybody.
    raise_failures: whether a stream that failed must end with an exception (see above).
    """

    def __init__(
        self, service: InferenceService, *, callers: Callers | None = None, raise_failures: bool = True
    ) -> None:
        self._service = service
        self._callers = callers or Callers()
        self._raise_failures = raise_failures

    def lets_in(self, context: GrpcContext) -> bool:
        """Whether a call's message may be read; sets the call's status where not. Counts only the refusal."""
        try:
            self._callers.identify(metadata_of(context), context.peer())
        except ClusterError as error:
            self._service.count_refused(error)
            set_status(context, error, "")
            return False
        return True

    async def Generate(self, request: bytes, grpc_context: GrpcContext) -> pb.GenerateResponse:
        request_id = self._service.new_request_id()

        async def answer(message: pb.GenerateRequest, client: str) -> pb.GenerateResponse:
            output = await self._service.generate(
                messages.to_prompt(message),
                messages.to_sampling_params(message.sampling_params),
                request_id=message.request_id or request_id,
                timeout_s=messages.to_timeout_s(message),
                client=client,
                max_bytes=receive_limit(metadata_of(grpc_context)),
            )
            return messages.to_generate_response(output)

        return await self._answer(request, grpc_context, pb.GenerateRequest, pb.GenerateResponse, answer, request_id)

    async def GenerateStream(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        request_id = self._service.new_request_id()
        try:
            with self._let_in(grpc_context) as client:
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
            details = set_status(grpc_context, error, request_id)
            if self._raise_failures:
                raise StreamFailed(details) from None

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
        request_id: str = "",
    ) -> Response:
        """Parses and answers a unary request; a failed one gets a status and an empty response.

        answer: from the message and whom it counts for.
        """
        request_id = request_id or self._service.new_request_id()
        try:
            with self._let_in(context) as client:
                message = self._parse(request, request_type)
                request_id = getattr(message, "request_id", "") or request_id
                response = await answer(message, client)
                check_after(response.ByteSize(), receive_limit(metadata_of(context)))
                return response
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            set_status(context, error, request_id)
            return response_type()

    @contextmanager
    def _let_in(self, context: GrpcContext) -> Iterator[str]:
        """Whom a call counts for, while it lasts. Raises Forbidden, Unauthenticated, Overloaded."""
        with ExitStack() as place:
            try:
                client = place.enter_context(self._callers.request(metadata_of(context), context.peer()))
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


def metadata_of(context: GrpcContext) -> dict[str, str]:
    return dict(context.invocation_metadata() or ())


def set_status(context: GrpcContext, error: Exception, request_id: str) -> str:
    """Sets the code and the details that a client sees of an error; returns the details.

    What is not written for clients goes to the log, and the client gets the request's id to ask after it.
    """
    code = error.grpc_code if isinstance(error, ClusterError) else "INTERNAL"
    if isinstance(error, ClusterError) and error.public:
        details = str(error)
    else:
        log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
        details = f"internal error, request id {request_id}; see the server's log"
    details = _truncate(details)
    context.set_code(grpc.StatusCode[code])
    context.set_details(details)
    if isinstance(error, Overloaded):
        context.set_trailing_metadata([(RETRY_KEY, str(round(1000 * error.retry_after_s)))])
    return details


def _truncate(details: str) -> str:
    if len(details) <= MAX_DETAILS_CHARS and len(details.encode()) <= MAX_DETAILS_BYTES:
        return details
    head = details[: MAX_DETAILS_CHARS - 1].encode()[: MAX_DETAILS_BYTES - 3]
    return head.decode(errors="ignore") + "…"


_KINDS = {  # by whether a handler takes many messages, and whether it gives many
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_inference_service(servicer: Any, server: Any, *, gated: bool = False) -> None:
    """Registers the rpcs with a gRPC server; requests stay bytes. For Serve's `grpc_servicer_functions`.

    gated: the handlers are those of `grpc_gate`, which read the message themselves.
    """
    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods:
        kind = _KINDS[gated, method.server_streaming]
        handlers[method.name] = kind(
            getattr(servicer, method.name), request_deserializer=None, response_serializer=_serialize
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    server.add_registered_method_handlers(SERVICE_NAME, handlers)


def _serialize(response: Message) -> bytes:
    return response.SerializeToString()
