"""The conversation that a response answers: the items of the one before it, its output, and the new input.

It is kept whole with each response, so that one that is gone or deleted takes nothing from those after it.
"""

import json
from typing import Any

from cluster.errors import InvalidRequest, NotFound
from cluster.serving.openai.responses.response_body import as_stored
from cluster.serving.openai.responses.schema import CallItem, Item, MessageItem, ResponseRequest
from cluster.serving.openai.responses.store import ResponseStore
from cluster.serving.openai.responses.writing import new_id

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}


MAX_ITEMS = 8192  # of one call's input: several calls of tools become one message, and of these 2,048 are allowed


class PreviousNotFound(NotFound):
    """A call that names a previous response which is not here; with the status that OpenAI's server has for it."""

    http_status = 400


async def conversation(body: ResponseRequest, store: ResponseStore, client: str) -> list[dict[str, Any]]:
    """Returns the items as JSON, oldest first. Raises InvalidRequest."""
    given = body.input if isinstance(body.input, list) else [MessageItem(role="user", content=body.input)]
    if len(given) > MAX_ITEMS:
        raise InvalidRequest(f"input has {len(given)} items, at most {MAX_ITEMS} are allowed", "input")
    before = []
    if body.previous_response_id is not None:
        before = await _until(body.previous_response_id, store, client)
    return [*before, *map(_as_json, given)]


async def _until(response_id: str, store: ResponseStore, client: str) -> list[dict[str, Any]]:
    """The items up to the end of a response."""
    name = "previous_response_id"
    try:
        stored = await store.get(response_id, client)
    except NotFound:
        raise PreviousNotFound(f"Previous response with id {response_id[:100]!r} not found", name) from None
    response = as_stored(stored)
    if response.status in ("queued", "in_progress", "failed"):
        raise InvalidRequest(f"the response {response_id!r} is {response.status}: nothing can follow it", name)
    return [*json.loads(stored.items), *response.output]


def _as_json(item: Item) -> dict[str, Any]:
    """An item as it is kept and shown: with an id, and a message's text as a part."""
    plain = item.model_dump(exclude_none=True)
    plain["id"] = item.id or new_id(_PREFIXES[item.type])
    if isinstance(item, MessageItem):
        kind = "output_text" if item.role == "assistant" else "input_text"
        parts = [{"type": kind, "text": item.content}] if isinstance(item.content, str) else plain["content"]
        plain["content"] = [_without_effect(part) for part in parts]
    if not isinstance(item, CallItem):
        plain.setdefault("status", "completed")
    return plain


def _without_effect(part: dict[str, Any]) -> dict[str, Any]:
    """A part without what was only given back."""
    kept = {name: value for name, value in part.items() if name not in ("annotations", "logprobs")}
    return kept | {"annotations": []} if part["type"] == "output_text" else kept
