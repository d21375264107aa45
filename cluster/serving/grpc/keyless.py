"""Streams of a grpc.aio server that need no key, reflection's, bounded as health's are."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from cluster.errors import ClusterError
from cluster.serving.admission.admission import Admission
from cluster.serving.grpc.context import metadata_of, peer_of, set_status


def bounded(handler: Callable[[Any, Any], AsyncIterator[Any]], admission: Admission) -> Callable[..., Any]:
    """Returns a handler of many messages and many answers, around one without bounds."""

    async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        try:
            with admission.watch(metadata_of(context), peer_of(context)):
                async for response in handler(requests, context):
                    yield response
        except ClusterError as error:
            set_status(context, error)

    return stream
