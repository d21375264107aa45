"""The calls of `/v1/responses`."""

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest, NotFound
from cluster.serving.choices import Call
from cluster.serving.openai.body import AnswerBody
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.responses.creating import create
from cluster.serving.openai.responses.events import ErrorEvent, ResponseEvent
from cluster.serving.openai.responses.items import in_these_words
from cluster.serving.openai.responses.response_body import ResponseBody, as_stored
from cluster.serving.openai.responses.schema import ResponseRequest
from cluster.serving.openai.responses.store import ResponseStore
from cluster.serving.openai.responses.writing import error_event, last_event
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import begun, streamed

JSON = "application/json"
PATH = "/v1/responses"
EVENTS = streamed(ResponseEvent, ErrorEvent)
NOTHING_YET = ": nothing yet\n\n"  # a comment: proxies see that the stream lives


class Deleted(AnswerBody):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(AnswerBody):
    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["responses"], route_class=BodyRoute, prefix=PATH)

    @routes.post("", response_model=ResponseBody, responses=EVENTS)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        served.adapter_of(body.model)
        call = Call(request_id=f"resp_{served.service.new_request_id()}", client=request.state.client)
        with in_these_words():
            return await create(served, body, call)

    _add_kept(routes, served.responses.store)
    return routes


def _add_kept(routes: APIRouter, store: ResponseStore) -> None:
    """The calls for a response that is kept."""

    @routes.get("/{response_id}", response_model=ResponseBody, responses=EVENTS)
    async def get_response(
        response_id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0)] | None = None,
    ) -> Response:
        stored = await store.get(response_id, request.state.client)
        if not stream:
            if starting_after is not None:
                raise InvalidRequest("starting_after is for streams: set stream to true", "starting_after")
            return _json(as_stored(stored))
        if stored.events is None:
            raise InvalidRequest(f"{response_id} was made without stream: true, and has no events", "stream")
        first = 0 if starting_after is None else starting_after + 1
        events = again(store, response_id, request.state.client, first)
        return await begun(events, response_id, error_event)

    @routes.delete("/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Deleted:
        await store.delete(response_id, request.state.client)
        return Deleted(id=response_id)

    @routes.post("/{response_id}/cancel", response_model=ResponseBody)
    async def cancel_response(response_id: str, request: Request) -> Response:
        if not as_stored(await store.get(response_id, request.state.client)).background:
            raise InvalidRequest(f"{response_id} does not run in the background: to cancel it, hang up", "response_id")
        return _json(as_stored(await store.cancel(response_id, request.state.client)))

    @routes.get("/{response_id}/input_items", response_model=ItemList)
    async def list_input_items(
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        items = json.loads((await store.get(response_id, request.state.client)).items)
        page = _page(items if order == "asc" else items[::-1], limit, after)
        return Response(json.dumps(page.model_dump()), media_type=JSON)  # which writes half characters, too


async def again(store: ResponseStore, response_id: str, client: str, first: int) -> AsyncGenerator[str, None]:
    """Yields a response's events from one on, those that are yet to come too. Raises NotFound, Unavailable."""
    while True:
        page = await store.follow(response_id, client, first)
        first += len(page.events)
        for text in page.events:
            yield text
        if page.ended:
            yield last_event(as_stored(await store.get(response_id, client)), page.num_events)
            return
        if not page.events:
            yield NOTHING_YET


def _json(response: ResponseBody) -> Response:
    return Response(response.model_dump_json(), media_type=JSON)


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> ItemList:
    """Raises NotFound."""
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise NotFound(f"the item {after[:100]!r} is not among the response's", "after")
        start = ids.index(after) + 1
    shown = items[start : start + limit]
    return ItemList(
        data=shown,
        first_id=shown[0]["id"] if shown else None,
        last_id=shown[-1]["id"] if shown else None,
        has_more=start + limit < len(items),
    )
