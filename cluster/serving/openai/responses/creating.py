"""One call that creates a response: whole, as a stream, or in the background."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi.responses import Response

from cluster.errors import Unavailable
from cluster.serving.choices import Call
from cluster.serving.openai.chat import PreparedChat, prepared
from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.forms import naming
from cluster.serving.openai.responses.background import BackgroundResponse
from cluster.serving.openai.responses.history import conversation
from cluster.serving.openai.responses.items import to_chat
from cluster.serving.openai.responses.making import Making
from cluster.serving.openai.responses.response_body import begin
from cluster.serving.openai.responses.schema import ITEMS, ResponseRequest
from cluster.serving.openai.responses.store import StoredResponse
from cluster.serving.openai.responses.truncation import cut_to_fit
from cluster.serving.openai.responses.writing import error_event
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import begun
from cluster.serving.openai.tool_reader import form_field

JSON = "application/json"


async def create(served: Served, body: ResponseRequest, call: Call) -> Response:
    """Raises ClusterError, in a chat's words."""
    body.check(keeps=served.responses.keeps)
    items = await conversation(body, served.responses.store, call.client)
    asked = await _chat(served, body, items, call.client)
    response = begin(
        body,
        response_id=call.request_id,
        model=served.shown_model(body.model),
        created_at=int(served.now_s()),
        store=body.is_stored and served.responses.keeps,
    )
    making = Making(response, served.now_s, streams=bool(body.stream))
    creation = Creation(served=served, call=call, asked=asked, items=json.dumps(items), making=making)
    with naming(form_field(asked)):
        return await creation.answer(stream=bool(body.stream))


async def _chat(served: Served, body: ResponseRequest, items: list[dict[str, Any]], client: str) -> ChatRequest:
    """Raises InvalidRequest."""
    known = ITEMS.validate_python(items)
    if body.truncation == "auto":
        known = await cut_to_fit(known, partial(to_chat, body), served.service, client)
    return to_chat(body, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """items: JSON, of the conversation."""

    served: Served
    call: Call
    asked: ChatRequest
    items: str
    making: Making

    async def answer(self, *, stream: bool) -> Response:
        """Raises ClusterError."""
        chat = await prepared(self.served, self.asked, self.call)
        if self.making.response.background:
            return await self.in_background(chat, stream=stream)
        if stream:
            return await begun(self.stream(chat), self.call.request_id, error_event)
        return await self.whole(chat)

    async def whole(self, chat: PreparedChat) -> Response:
        async with aclosing(self.making.run(chat)) as events:
            async for _ in events:
                pass
        await self._keep()
        return _json(self.making)

    async def stream(self, chat: PreparedChat) -> AsyncGenerator[str, None]:
        """Yields all events. An error after the first makes the response a failed one; a client that leaves ends it."""
        making = self.making
        rest: list[str] = []
        try:
            async with aclosing(making.run(chat)) as events:
                async for text in events:
                    yield text
        except (GeneratorExit, asyncio.CancelledError):
            making.cancel()
            if making.begun and making.response.store:
                self.served.responses.keep_later(self._stored())
            raise
        except Exception as error:
            if not making.begun:
                raise
            rest = making.fail(error)
        for text in rest:
            yield text
        await self._keep()
        yield making.last_event()

    async def in_background(self, chat: PreparedChat, *, stream: bool) -> Response:
        """Raises ClusterError for what would fail at once."""
        if self.served.service.admission.draining:
            raise Unavailable("this server is shutting down, send the request to another one")
        await chat.check()
        making = self.making
        making.announce()
        response = BackgroundResponse(making, self._stored(running=True), self._tries)
        await self.served.responses.begin(response)
        if stream:
            return await begun(response.follow(), self.call.request_id, error_event)
        return _json(making)

    async def _tries(self) -> AsyncGenerator[str, None]:
        """One try: a chat's answer is read once."""
        chat = await prepared(self.served, self.asked, replace(self.call, accepted=True))
        async with aclosing(self.making.run(chat)) as events:
            async for text in events:
                yield text

    async def _keep(self) -> None:
        """Before the client learns of the end: it may ask for the response at once."""
        if self.making.response.store and not await self.served.responses.keep(self._stored()):
            self.making.not_kept()

    def _stored(self, *, running: bool = False) -> StoredResponse:
        return StoredResponse(
            response_id=self.call.request_id,
            client=self.call.client,
            response=self.making.response.model_dump_json(),
            items=self.items,
            events=tuple(self.making.events) if self.making.keeps_events else None,
            running=running,
        )


def _json(making: Making) -> Response:
    return Response(making.response.model_dump_json(), media_type=JSON)
