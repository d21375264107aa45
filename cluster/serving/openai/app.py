"""The application: mounts each family's router, and stands the gate before them all. Decides nothing.

Another family: a file with `router(served) -> APIRouter`, a line in ROUTERS, and, where a path of it is for everybody
(no key), its path in KEYLESS.
"""

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import NotFound
from cluster.serving.openai import (
    adapters,
    changes,
    chat,
    classes,
    completions,
    embeddings,
    live,
    messages,
    models,
    page,
    status,
    token_calls,
)
from cluster.serving.openai.document import describe
from cluster.serving.openai.errors import add_handlers, response_to
from cluster.serving.openai.gate import Gate
from cluster.serving.openai.responses import routes as responses
from cluster.serving.openai.served import Served
from cluster.serving.text.lane import Lane
from cluster.version import __version__

ROUTERS = (
    adapters.router,
    changes.router,
    chat.router,
    classes.router,
    completions.router,
    embeddings.router,
    live.router,
    messages.router,
    models.router,
    page.router,
    responses.router,
    status.router,
    token_calls.router,
)
KEYLESS = status.KEYLESS | page.KEYLESS


def make_api(served: Served) -> FastAPI:
    """The routes without the gate. Its pages of documentation would load scripts from elsewhere: there are none."""
    api = FastAPI(title="moe-cluster", version=__version__, docs_url=None, redoc_url=None)
    api.state.large_bodies = Lane("large bodies", served.service.limits.max_waiting_inputs)
    for router in ROUTERS:
        api.include_router(router(served))
    add_handlers(api, served.service.count_refused)
    describe(api, KEYLESS.__contains__, lambda: (*served.model_names, *served.service.adapters()))
    return api


async def no_api(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a server that answers gRPC alone."""
    if scope["type"] == "http":
        error = NotFound("HTTP is switched off here (http_api is false): this server answers gRPC", "request")
        await response_to(error)(scope, receive, send)


def make_app(served: Served) -> ASGIApp:
    """The whole front of one ingress."""
    api = make_api(served)

    def takes(scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in api.routes)

    return Gate(api, served.service, KEYLESS.__contains__, takes, live.WATCHED.__contains__)
