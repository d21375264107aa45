"""`grpc.health.v1.Health` for Ray Serve's gRPC ingress: Check, List and Watch over one `HealthState`.

Register with `grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server` in Serve's `grpc_servicer_functions`;
requests arrive parsed.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from grpc_health.v1 import health_pb2

from cluster.errors import ClusterError
from cluster.serving.admission.admission import Admission
from cluster.serving.grpc.calls import may_ask
from cluster.serving.grpc.context import GrpcContext, StreamFailed, metadata_of, peer_of, set_status
from cluster.serving.grpc.registration import SERVICE_NAME
from cluster.serving.health import HealthState

_SERVICES = ("", SERVICE_NAME)


class GrpcHealthService:
    """A mixin of the ingress deployment. Knows the service names "" and "moecluster.v1.InferenceService".

    It asks for no key. raise_failures: as GrpcInferenceService's.
    """

    def __init__(self, state: HealthState, admission: Admission, *, raise_failures: bool = True) -> None:
        self._health = state
        self._admission = admission
        self._raise_failures = raise_failures

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: GrpcContext
    ) -> health_pb2.HealthCheckResponse:
        if not may_ask(self._admission, grpc_context):
            return health_pb2.HealthCheckResponse()
        if request.service not in _SERVICES:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(f"no service {request.service[:200]!r} is served here")
            return health_pb2.HealthCheckResponse()
        return _response(self._health.serving)

    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: GrpcContext
    ) -> health_pb2.HealthListResponse:
        if not may_ask(self._admission, grpc_context):
            return health_pb2.HealthListResponse()
        return health_pb2.HealthListResponse(
            statuses={service: _response(self._health.serving) for service in _SERVICES}
        )

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        try:
            with self._admission.watch(metadata_of(grpc_context), peer_of(grpc_context)):
                if request.service not in _SERVICES:
                    yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                    await asyncio.Event().wait()  # the protocol keeps the stream open until the client closes it
                async with aclosing(self._health.watch()) as states:
                    async for serving in states:
                        yield _response(serving)
        except ClusterError as error:
            details = set_status(grpc_context, error)
            if self._raise_failures:
                raise StreamFailed(details) from None


def _response(serving: bool) -> health_pb2.HealthCheckResponse:
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    return health_pb2.HealthCheckResponse(status=status)
