"""The services of the gRPC port, as a gRPC server registers their rpcs: requests stay bytes."""

from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from cluster.pb.inference import grpc_service_pb2
from cluster.pb.moecluster.v1 import inference_pb2
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2
from cluster.wire import HEALTH_METHODS

# By the prefix that their rpcs have as methods of the ingress, where they would be called as another service's.
SERVICES: tuple[tuple[str, ServiceDescriptor], ...] = (
    ("", inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]),
    ("Vllm", vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]),
    ("", grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]),
)
SERVICE_NAME, VLLM_SERVICE_NAME, KSERVE_SERVICE_NAME = (service.full_name for _, service in SERVICES)
# Rpcs of many requests, each of which is answered by itself (`exchange`).
EXCHANGES = (f"/{KSERVE_SERVICE_NAME}/ModelStreamInfer",)
_PREFIXES = {service.full_name: prefix for prefix, service in SERVICES}
_KINDS = {  # by whether a handler takes many messages, and whether it gives many
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_inference_service(servicer: Any, server: Any, *, gated: bool = False) -> None:
    """Registers the rpcs of all services that the servicer has (Serve's has any) with a gRPC server.

    gated: the handlers are those of `gate`, which read the message themselves, but for health.
    """
    for prefix, service in SERVICES:
        if not hasattr(servicer, prefix + service.methods[0].name):
            continue
        handlers = {}
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            many = method.client_streaming or (gated and path not in HEALTH_METHODS)
            handler = getattr(servicer, ingress_method(path).rpartition("/")[2])
            handlers[method.name] = _KINDS[many, method.server_streaming](
                handler, request_deserializer=None, response_serializer=_serialize
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        server.add_registered_method_handlers(service.full_name, handlers)


def ingress_method(path: str) -> str:
    """The path of an rpc ("/package.Service/Method") with the name of the ingress's method at its end."""
    service, _, method = path.removeprefix("/").rpartition("/")
    return f"/{service}/{_PREFIXES.get(service, '')}{method}"


def _serialize(response: Message) -> bytes:
    return response.SerializeToString()
