"""Server-sent events: an answer of many JSON objects, each sent as it is made. Source: WHATWG HTML, section 9.2."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from cluster.serving.openai.errors import body_of

DONE = "data: [DONE]\n\n"
# Characters inside of JSON's texts where some clients end a line (httpx, and Python's splitlines).
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
MEDIA_TYPE = "text/event-stream; charset=utf-8"


def streamed(data: type[BaseModel], error: type[BaseModel], *, done: bool = False) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: with `stream` its answer is of this kind.

    `itemSchema` is OpenAPI 3.2's word for one event; 3.1 has none, and its readers find the models by their names alone
    (`document.py` writes them).

    data: a model of an event's data.  error: of the one that ends a broken stream.  done: [DONE] ends a whole one.
    """
    refs = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (data, error)]
    of_json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    text = {"anyOf": [of_json, {"const": "[DONE]"}]} if done else of_json
    item = {"type": "object", "properties": {"event": {"type": "string"}, "data": text}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}}}


def event(data: BaseModel, name: str = "") -> str:
    """One event. Fields that were not set are left out; those that were set to None are null.

    name: of its kind, for APIs that give one.
    """
    return event_text(data.model_dump_json(exclude_unset=True), name)


def event_text(data: str, name: str = "") -> str:
    """As `event`, of an object that is JSON in one line already."""
    kind = f"event: {name}\n" if name else ""
    return f"{kind}data: {data if data.isascii() else data.translate(_BREAKS)}\n\n"


class EventStream(Response):
    """Sends events as an async generator makes them; closes it also when the client leaves.

    events: not begun yet. An error before the first event becomes the answer's status, as `begun` makes sure.
    """

    media_type = MEDIA_TYPE

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_event(error: Exception, request_id: str) -> str:
    """The event that ends a broken stream, in OpenAI's shape."""
    return event_text(json.dumps(body_of(error, request_id)))


async def begun(
    events: AsyncGenerator[str, None], request_id: str, failed: Callable[[Exception, str], str] = error_event
) -> EventStream:
    """A stream whose first event is there: an error before it is raised here, and has a status of its own.

    A later one ends the stream with an event that has the error, which `failed` makes, and without [DONE].
    """
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_rest(first, events, lambda error: failed(error, request_id)))


async def _rest(
    first: str, events: AsyncGenerator[str, None], failed: Callable[[Exception], str]
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        try:
            yield first
            async for text in events:
                yield text
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but an error in the API's shape
            yield failed(error)
