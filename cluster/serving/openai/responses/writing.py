"""Writes a response as it grows: its output items, and the typed events that tell of them. Knows no network.

Source: OpenAI's API reference, "Streaming events". An item is open at a time; a text is one part of a message.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.serving.openai import sse
from cluster.serving.openai.chat_schema import AnswerMessage
from cluster.serving.openai.errors import body_of
from cluster.serving.openai.responses.response_body import ENDED, ResponseBody

Json = dict[str, Any]
_LAST = {"completed": "response.completed", "failed": "response.failed"}  # any other end: response.incomplete


def event_text(event: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return sse.event_text(json.dumps(event, ensure_ascii=False, separators=(",", ":")), event["type"])


def last_event(response: ResponseBody, sequence_number: int) -> str:
    """The event that ends a stream, of a response that has ended."""
    assert response.status in ENDED
    kind = _LAST.get(response.status, "response.incomplete")
    return event_text({"type": kind, "sequence_number": sequence_number, "response": response.model_dump()})


def error_event(error: Exception, response_id: str, sequence_number: int = 0) -> str:
    """The event that ends a stream which broke; the response itself may go on."""
    body = body_of(error, response_id)["error"]
    shown = {name: body[name] for name in ("code", "message", "param")}
    return event_text({"type": "error", "sequence_number": sequence_number, **shown})


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class OutputWriter:
    """Makes items and events of the parts of an assistant's message. Events go to `emit` in their order."""

    def __init__(self, emit: Callable[[Json], None]) -> None:
        self._emit = emit
        self.items: list[Json] = []
        self._open: Json | None = None
        self._logprobs: list[Json] = []  # of tokens whose text has not come

    def token_logprobs(self, logprobs: Sequence[Json]) -> None:
        """Takes those of the tokens that bring the next parts. Those of a call's tokens have no place."""
        self._logprobs += logprobs

    def add(self, part: AnswerMessage) -> None:
        if part.content:
            self._write(part.content)
        for call in part.tool_calls or ():
            self._logprobs.clear()
            function = call.get("function", {})
            if function.get("name"):
                self._begin_call(call["id"], function["name"])
            if function.get("arguments"):
                self._write_arguments(function["arguments"])

    def end(self, status: str = "completed") -> None:
        """Closes the open item. An answer without any item gets an empty message."""
        if not self.items:
            self._begin_message()
        if self._logprobs and self._open is not None and self._open["type"] == "message":
            self._write("")
        self._close(status)

    def _write(self, text: str) -> None:
        if self._open is None or self._open["type"] != "message":
            self._close()
            self._begin_message()
        assert self._open is not None
        [content] = self._open["content"]
        content["text"] += text
        content["logprobs"] += self._logprobs
        self._tell("output_text.delta", content_index=0, delta=text, logprobs=self._logprobs)
        self._logprobs = []

    def _write_arguments(self, text: str) -> None:
        assert self._open is not None
        self._open["arguments"] += text
        self._tell("function_call_arguments.delta", delta=text)

    def _begin_message(self) -> None:
        item: Json = {
            "id": new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._begin(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._tell("content_part.added", content_index=0, part={**part})
        item["content"] = [part]

    def _begin_call(self, call_id: str, name: str) -> None:
        self._close()
        self._begin(
            {
                "id": new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call_id, "name": name,
                "arguments": "",
            }
        )  # fmt: skip

    def _begin(self, item: Json) -> None:
        self.items.append(item)
        self._open = item
        self._tell("output_item.added", item={**item})

    def _close(self, status: str = "completed") -> None:
        item = self._open
        if item is None:
            return
        if item["type"] == "message":
            [part] = item["content"]
            self._tell("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
            self._tell("content_part.done", content_index=0, part=part)
        else:
            self._tell("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        item["status"] = status
        self._tell("output_item.done", item={**item})
        self._open = None

    def _tell(self, kind: str, **fields: Any) -> None:
        """One event about the open item."""
        assert self._open is not None
        where: Json = {"output_index": len(self.items) - 1}
        if not kind.startswith("output_item"):
            where["item_id"] = self._open["id"]
        self._emit({"type": f"response.{kind}", **where, **fields})
