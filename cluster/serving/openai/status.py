"""Questions about the server itself: is it well, does it take requests, which version is it, its figures."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from cluster.errors import Unavailable
from cluster.serving.openai.served import Served
from cluster.version import __version__

KEYLESS = frozenset({"/health", "/ready", "/version", "/ping", "/openapi.json"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["status"])

    @routes.get("/health", response_class=Response)
    @routes.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 while requests are answered, also while this server ends and answers its last ones."""
        if served.health.serving or served.service.admission.draining:
            return Response()
        raise Unavailable("some part of the cluster is not up")

    @routes.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while new requests are taken."""
        if served.health.serving:
            return Response()
        raise Unavailable("this server takes no requests now")

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The figures of all processes of this ingress's node, for Prometheus. Asks for a key where calls need one."""
        return Response(await served.metrics(), media_type=METRICS_TYPE)

    return routes
