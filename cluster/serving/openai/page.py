"""The live page at `/`: its files, for everybody; the figures that it shows ask for a key where calls need one.

Nothing of it comes from elsewhere, and no script stands in the page: the policy below lets a browser run nothing else.
"""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.serving.openai.served import Served
from cluster.serving.page import PageFile, page_files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # a browser asks each time, and gets 304
}
FILES = page_files()
KEYLESS = frozenset(FILES)


def router(served: Served) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    if served.live is None:
        return routes
    for path, file in FILES.items():
        routes.add_api_route(path, _sender(file), methods=["GET", "HEAD"])
    return routes


def _sender(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        headers = HEADERS | {"etag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send
