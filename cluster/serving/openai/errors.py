"""Errors in the shapes that clients read: OpenAI's {"error": {"message", "type", "param", "code"}}, or Anthropic's."""

import logging
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from cluster.errors import ClusterError, InvalidRequest, NotFound, Overloaded, Unauthenticated
from cluster.inputs import shown

log = logging.getLogger(__name__)

_PLACES = ("body", "query", "path")  # where pydantic says that a value stood
METHODS = ("DELETE", "GET", "HEAD", "POST", "PUT", "PATCH")
MAX_MESSAGE_CHARS = 1000
NO_JSON = "the body is no JSON that can be read: it is broken, or nested too deeply"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_NOT_FOUND_CODES = {"model": "model_not_found", "previous_response_id": "previous_response_not_found"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable"}  # also in a stream's event
_PROMPT_PARAMS = {
    "/v1/chat/completions": "messages", "/v1/embeddings": "input", "/pooling": "input", "/classify": "input",
    "/detokenize": "tokens",
    **dict.fromkeys(("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank")),
}  # fmt: skip
_PARAMS = {"text": "prompt", "token_ids": "prompt", "chat": "messages", "request": None, "": None}


class ErrorFields(BaseModel):
    """param: the field that is at fault, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: ErrorFields


class AnthropicFields(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: str
    error: AnthropicFields


class BadBody(InvalidRequest):
    """A body that a call's model refuses; `field` is one of the body's own."""


def add_handlers(app: FastAPI, refused: Callable[[ClusterError], None]) -> None:
    """Makes every error of an app leave it in OpenAI's shape.

    refused: counts a call that ended before it was a request.
    """

    def count(request: Request, error: Exception) -> None:
        if request.state.client and isinstance(error, InvalidRequest | Overloaded):  # not for everybody, as /ready is
            refused(error)

    async def cluster_error(request: Request, error: Exception) -> Response:
        count(request, error)
        return response_to(error, request.state.request_id, request.url.path)

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        refusal = _refusal(error)
        count(request, refusal)
        return response_to(refusal, request.state.request_id, request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path[:200]}" if error.status_code != 400 else (
            NO_JSON
        )  # fmt: skip
        if error.status_code == 400:
            count(request, InvalidRequest(message, "request"))
        body = _body(error.status_code, message)
        headers = {"allow": _methods(request)} if error.status_code == 405 else error.headers
        return _response(error.status_code, body, request.url.path, headers)

    app.add_exception_handler(Exception, cluster_error)
    app.add_exception_handler(ClusterError, cluster_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)


def _methods(request: Request) -> str:
    """The methods that a path has; Starlette names those of the first of its functions."""
    scope, routes = request.scope, request.app.routes
    return ", ".join(
        method for method in METHODS if any(r.matches({**scope, "method": method})[0] is Match.FULL for r in routes)
    )


def status_of(error: Exception) -> int:
    """Of the answer to a call that failed with this error."""
    return error.http_status if isinstance(error, ClusterError) else 500


def response_to(error: Exception, request_id: str = "", path: str = "") -> Response:
    """The answer to a call of a path that failed with this error, before anything of another answer was sent."""
    status, headers = status_of(error), {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return _response(status, body_of(error, request_id, path), path, headers)


def body_of(error: Exception, request_id: str = "", path: str = "") -> dict[str, Any]:
    """An error as a JSON object.

    One that is not written for clients goes to the log, and the client gets the request's id to ask after it.
    """
    if not isinstance(error, ClusterError) or not error.public:
        log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
        return _body(500, f"internal error, request id {request_id or 'unknown'}; see the server's log")
    param = (error.field or None) if isinstance(error, InvalidRequest) else None
    if not isinstance(error, BadBody):
        param = _PARAMS.get(param or "", param)
        param = _PROMPT_PARAMS.get(path, param) if param == "prompt" else param
    code = _NOT_FOUND_CODES.get(param or "") if isinstance(error, NotFound) else None
    return _body(error.http_status, str(error), param, code)


def _body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[: MAX_MESSAGE_CHARS - 1]}…"
    return {"error": {"message": text, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def anthropic_body(error: Exception, request_id: str = "") -> dict[str, Any]:
    """An error in Anthropic's shape: {"type": "error", "error": {"type", "message"}}."""
    status = error.http_status if isinstance(error, ClusterError) else 500
    return _in_anthropics_shape(status, body_of(error, request_id))


def _in_anthropics_shape(status: int, body: dict[str, Any]) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def _response(status: int, body: dict[str, Any], path: str, headers: Mapping[str, str] | None) -> Response:
    if path.startswith(ANTHROPIC_PATH):
        body = _in_anthropics_shape(status, body)
    return JSONResponse(body, status, headers)


def _refusal(invalid: RequestValidationError) -> BadBody:
    """The first fault that pydantic found, as one line."""
    found = invalid.errors()
    # A union has faults of each of its members: the one that came furthest is the one that was meant.
    first = max((one for one in found if one["loc"][:2] == found[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    kind = first["type"]
    if kind == "json_invalid":
        return BadBody(NO_JSON)
    where = _place(first, invalid.body)
    path, field = ".".join(where)[:200], where[0][:100] if where else ""
    if kind == "extra_forbidden":
        return BadBody(f"unrecognized request argument: {path}", field)
    if kind == "union_tag_invalid":
        context = first["ctx"]
        message = f"type {shown(context['tag'])} is not known here, only {context['expected_tags']}"
    else:
        message = "its type is missing" if kind == "union_tag_not_found" else first["msg"]
    return BadBody(f"{path or 'the body'}: {message}", field)


def _place(fault: Mapping[str, Any], body: Any) -> list[str]:
    """Where in a body a fault is, by the body's own keys and places: pydantic also names which of several types it
    tried there."""
    parts, found, value = [part for part in fault["loc"] if part not in _PLACES], list[str](), body
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        elif not (last and fault["type"] == "missing") and isinstance(body, dict):
            continue
        found.append(str(part).encode("utf-8", "backslashreplace").decode())
    return found
