"""Follows one response from its first token to its end, as events. Knows no store."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from cluster.serving.choices import Choice
from cluster.serving.openai.chat import PreparedChat
from cluster.serving.openai.logprobs import chat_logprobs
from cluster.serving.openai.message_reader import reader_for
from cluster.serving.openai.responses.response_body import ResponseBody, ResponseUsage
from cluster.serving.openai.responses.writing import Json, OutputWriter, event_text, last_event


class Making:
    """response: as far as it has come.  events: all that were made, of a stream that is kept.

    streams: somebody reads the events; there are none else.  now_s: seconds since 1970.
    """

    def __init__(self, response: ResponseBody, now_s: Callable[[], float], *, streams: bool) -> None:
        self.response, self._now_s, self._streams = response, now_s, streams
        self.events: list[str] = []
        self.begun = False  # there is a token
        self._new: list[str] = []
        self._num_events = 0
        self._choice = Choice()
        self._writer = OutputWriter(self._emit)

    @property
    def keeps_events(self) -> bool:
        return self._streams and self.response.store

    def announce(self) -> list[str]:
        """Returns the first events of a response that waits for its turn."""
        self._emit_whole("response.created")
        self._emit_whole("response.queued")
        return self._taken()

    async def run(self, chat: PreparedChat) -> AsyncGenerator[str, None]:
        """Yields the events that follow, without the last; the first with the first token. Raises ClusterError."""
        reader, text_of = reader_for(chat.body), chat.served.service.token_bytes
        async with aclosing(chat.deltas) as deltas:
            async for _, delta in deltas:
                if not self.begun:
                    self._begin()
                self._choice.add(delta)
                if chat.body.logprobs and delta.logprobs:
                    self._writer.token_logprobs(chat_logprobs(delta.logprobs, text_of).model_dump()["content"])
                parts = reader.read(delta.text)
                if delta.finish_reason is not None:
                    parts += reader.end()
                for part in parts:
                    self._writer.add(part)
                for text in self._taken():
                    yield text
        cut = self._choice.finish_reason == "length"
        self._end("incomplete" if cut else "completed", {"reason": "max_output_tokens"} if cut else None)
        for text in self._taken():
            yield text

    def fail(self, error: Exception) -> list[str]:
        """Ends the response by an error; returns the events before the last."""
        self._end("failed")
        self.response = self.response.failed(error)
        return self._taken()

    def cancel(self) -> list[str]:
        """Ends the response because nobody wants it any more; returns the events before the last."""
        self._end("cancelled")
        return self._taken()

    def not_kept(self) -> None:
        """Takes note that the store did not take the response."""
        self.response = self.response.model_copy(update={"store": False})

    def last_event(self) -> str:
        """Returns the event that ends the stream of a response that has ended."""
        return last_event(self.response, self._num_events)

    def _begin(self) -> None:
        self.response = self.response.model_copy(update={"status": "in_progress"})
        if not self.response.background:
            self._emit_whole("response.created")
        self._emit_whole("response.in_progress")
        self.begun = True

    def _end(self, status: str, details: dict[str, str] | None = None) -> None:
        if self.begun:
            self._writer.end("completed" if status == "completed" else "incomplete")
        usage = ResponseUsage.of(self._choice.usage) if self._choice.finish_reason is not None else None
        self.response = self.response.model_copy(
            update={
                "status": status,
                "completed_at": int(self._now_s()) if status == "completed" else None,
                "incomplete_details": details,
                "output": self._writer.items,
                "usage": usage,
            }
        )

    def _emit_whole(self, kind: str) -> None:
        if self._streams:
            self._emit({"type": kind, "response": self.response.model_dump()})

    def _emit(self, event: Json) -> None:
        if not self._streams:
            return
        self._new.append(event_text({**event, "sequence_number": self._num_events}))
        self._num_events += 1

    def _taken(self) -> list[str]:
        taken, self._new = self._new, []
        if self.keeps_events:
            self.events += taken
        return taken
