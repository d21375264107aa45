"""The rpcs of `moecluster.v1.InferenceService`, as a gRPC server registers them: requests stay bytes."""

from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.pb.moecluster.v1 import inference_pb2 as pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_KINDS = {  # by whether a handler takes many messages, and whether it gives many
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_inference_service(servicer: Any, server: Any, *, gated: bool = False) -> None:
    """Registers the rpcs with a gRPC server. For Serve's `grpc_servicer_functions`.

    gated: the handlers are those of `gate`, which read the message themselves.
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
