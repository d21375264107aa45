"""A call's way around its answer: who calls, how many there are, its message, its errors. Knows no rpc."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from cluster.errors import ClusterError, InvalidRequest
from cluster.serving.admission.admission import Admission
from cluster.serving.grpc.answer_size import check_after, receive_limit
from cluster.serving.grpc.context import GrpcContext, metadata_of, peer_of, set_status
from cluster.serving.service import InferenceService
from cluster.serving.text.lane import Lane

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Value = TypeVar("Value")

# Of a request; a larger one is read in a thread. Of 1 MiB, the most by default, reading takes 25 ms with token ids, and
# 600 with JSON of 350,000 values; 16 KiB take 10 at most. The loop waits 5 ms for the interpreter lock instead, and 55
# while a megabyte of JSON is parsed, which keeps that.
LARGE_BYTES = 16_384


class GrpcCalls:
    """Not thread-safe. raise_failures: a stream that failed must end with an exception
    (`handlers`); of KServe's streams none fails, for each error goes out as a message."""

    def __init__(self, service: InferenceService, *, raise_failures: bool = True) -> None:
        self._service = service
        self._raise_failures = raise_failures
        self._large = Lane("large requests", service.limits.max_waiting_inputs)

    def lets_in(self, context: GrpcContext) -> bool:
        """Returns whether a call's message may be read; sets the call's status if not. Counts only the refusal."""
        try:
            self._service.admission.identify(metadata_of(context), peer_of(context))
        except ClusterError as error:
            self._service.count_refused(error)
            set_status(context, error)
            return False
        return True

    def count_refused(self, error: ClusterError) -> None:
        """Counts a call that `lets_in` let in, and whose message did not come."""
        self._service.count_refused(error)

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
            with self._counted(context, request_type) as client:
                message = await self._beside(request, lambda: self._parse(request, request_type), client)
                request_id = getattr(message, "request_id", "") or request_id
                response = await answer(message, client)
            check_after(response.ByteSize(), receive_limit(metadata_of(context)))
            return response
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            set_status(context, error, request_id)
            return response_type()

    async def _beside(self, request: bytes, work: Callable[[], Value], client: str) -> Value:
        """Returns the outcome of work on a request: of a large one in a thread. Raises as it does, and Overloaded."""
        return work() if len(request) < LARGE_BYTES else await self._large.run(work, client)

    @contextmanager
    def _counted(self, context: GrpcContext, request_type: type[Message]) -> Iterator[str]:
        """Counts a call while it is open, and its refusal; traces one that is let in. Yields its client. Raises
        Forbidden, Unauthenticated, Overloaded."""
        try:
            metadata, admission = metadata_of(context), self._service.admission
            with admission.call(metadata, peer_of(context)) as client, self._traced(metadata, request_type):
                yield client
        except ClusterError as error:
            self._service.count_refused(error)
            raise

    @contextmanager
    def _traced(self, metadata: Mapping[str, str], request_type: type[Message]) -> Iterator[None]:
        """The call's span is named as its rpc, which its message is named after."""
        if self._service.spans is None:
            yield
            return
        rpc = request_type.DESCRIPTOR.full_name.removesuffix("Request")
        with self._service.spans.call(rpc, metadata, rpc__system__name="grpc") as span:
            try:
                yield
            except Exception as error:
                span.by_grpc(error.grpc_code if isinstance(error, ClusterError) else ClusterError.grpc_code)
                raise
            span.by_grpc("OK")

    def _parse(self, request: bytes, request_type: type[Request]) -> Request:
        limit = self._service.limits.max_request_bytes
        if len(request) > limit:
            raise InvalidRequest(f"the request has {len(request)} bytes, at most {limit} are allowed", "request")
        try:
            return request_type.FromString(request)
        except DecodeError as error:
            raise InvalidRequest(f"the request cannot be read: {error}", "request") from error


def may_ask(admission: Admission, context: GrpcContext) -> bool:
    """Whether a question without a key is answered; sets the status if not."""
    try:
        admission.question(metadata_of(context), peer_of(context))
    except ClusterError as error:
        set_status(context, error)
        return False
    return True
