"""Reflection on a grpc.aio server: it needs no key, so its streams and their messages are bounded."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded
from cluster.serving.admission.admission import Admission
from cluster.serving.grpc.context import metadata_of, peer_of, set_status

MAX_MESSAGE_BYTES = 4096  # a reflection client sends the name of a symbol or of a file
MESSAGE_TIMEOUT_S = 20.0  # for each message to come


def bounded(handler: Any, admission: Admission) -> Any:
    """Returns a `grpc.RpcMethodHandler` of many messages and many answers, around one without bounds.

    Each message counts as a call without a key. One of more than MAX_MESSAGE_BYTES is not parsed, and counts as many.
    """
    answer: Callable[[Any, Any], AsyncIterator[Any]] = handler.stream_stream

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[Any, None]:
        try:
            with admission.watch(metadata_of(context), peer_of(context)) as count:
                messages = _bounded_messages(requests, handler.request_deserializer, count)
                async for response in answer(messages, context):
                    yield response
        except ClusterError as error:
            set_status(context, error)

    return handler._replace(request_deserializer=None, stream_stream=stream)


async def _bounded_messages(
    requests: AsyncIterator[bytes], parse: Callable[[bytes], Any], count: Callable[[int], None]
) -> AsyncGenerator[Any, None]:
    """Yields the parsed messages of a stream. Raises Overloaded, InvalidRequest, DeadlineExceeded."""
    while (request := await _next(requests)) is not None:
        count(1 + len(request) // MAX_MESSAGE_BYTES)
        if len(request) > MAX_MESSAGE_BYTES:
            raise Overloaded(f"a message without a key has at most {MAX_MESSAGE_BYTES} bytes, not {len(request)}")
        try:
            message = parse(request)
        except DecodeError as error:
            raise InvalidRequest("the message is damaged") from error
        yield message


async def _next(requests: AsyncIterator[bytes]) -> bytes | None:
    """Returns None at the end of the stream."""
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no message came within {MESSAGE_TIMEOUT_S:g} s: call again") from None
