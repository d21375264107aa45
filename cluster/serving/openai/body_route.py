"""Reads large bodies in a thread, so that the event loop goes on with everybody's streams. Knows no call."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from cluster.serving.text.lane import Lane

LARGE_BYTES = 16_384  # about 6 ms of the event loop, if they are many small turns: 25,000 in 0.9 MB take 360 ms


class BodyField(Protocol):
    """The part of FastAPI's `ModelField` that is used: an object of the body's model, and what is wrong with it."""

    def validate(
        self, value: Any, values: dict[str, Any] = ..., *, loc: tuple[int | str, ...] = ...
    ) -> tuple[Any, list[dict[str, Any]]]: ...


class BodyRoute(APIRoute):
    """A route whose large body is parsed and validated in the thread of the application's `state.large_bodies`.

    The thread shares the interpreter lock, which it gives up every 5 ms: a loop beside it is late by that, and by the
    10 ms that parsing a megabyte of JSON takes.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, field = super().get_route_handler(), self.body_field

        async def read_first(request: Request) -> Response:
            body = await request.body()
            if field is None or len(body) < LARGE_BYTES:
                return await handle(request)
            lane: Lane = request.app.state.large_bodies
            try:
                given, value, faults = await lane.run(lambda: read_body(body, field), request.state.client)
            except (ValueError, RecursionError):  # no JSON: FastAPI comes to the same end, and words it
                return await handle(request)
            if faults:
                raise RequestValidationError(faults, body=given)
            return await handle(_Read(request, value))

        return read_first


def read_body(body: bytes, field: BodyField) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A body as it is, as its model, and its faults. Raises ValueError, RecursionError for what is no JSON."""
    given = json.loads(body)
    return given, *field.validate(given, loc=("body",))


class _Read(Request):
    """A request whose body has been read: FastAPI's own validation passes an object of the body's model."""

    def __init__(self, request: Request, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"  # some: none would be no body

    async def json(self) -> Any:
        return self._value
