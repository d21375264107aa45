"""Streams of `/v1/completions`: OpenAI's server-sent events, for measuring and for chaos. Read by threads."""

import http.client
import json
import queue
import ssl
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from typing import Any

from cluster.client.going_on import Patience, going_on, seeded
from cluster.client.urls import server_url
from cluster.errors import BrokenStream, ClusterError, Overloaded, Unavailable
from cluster.types import Logprobs, SamplingParams, TextDelta

TIMEOUT_S = 600.0  # between two bytes of an answer
_NO_FIELDS = ("structured_outputs", "logit_bias")  # of a body; none of those that ask has them


class HttpStreams:
    """address: "host:port", or a URL.  key: "" for none.  tls: for https, None for the usual authorities.
    adapter: the name of the LoRA adapter that answers, "" for the model alone.
    goes_on: an answer whose connection breaks goes on over another one; else nothing is tried again.

    For several threads; connections are used again. Uses no proxy.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str = "",
        tls: ssl.SSLContext | None = None,
        adapter: str = "",
        goes_on: bool = False,
    ) -> None:
        """Raises SetupError."""
        self._patience = Patience() if goes_on else None
        parts = server_url(address, "--http")
        self._host, self._port = parts.hostname or "", parts.port
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._model = {"model": adapter} if adapter else {}
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[TextDelta]:
        """Yields the pieces of an answer. Raises ClusterError, also for a stream that ends before its end."""
        body = {"prompt": list(prompt), "stream": True, "return_token_ids": True, **self._model}
        if self._patience is None:
            return self._stream(body | _given(params))
        body |= _given(seeded(params))

        def ask(received: tuple[int, ...]) -> Generator[TextDelta, None, None]:
            return self._stream(body | ({"continue_from": received} if received else {}))

        return going_on(ask, self._patience)

    def _stream(self, body: dict[str, Any]) -> Generator[TextDelta, None, None]:
        """One connection's part of an answer. Raises ClusterError."""
        connection, through = self._connection(), False
        where = f"{self._host}:{self._port}"
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(answer)
            yield from _pieces(answer)
            answer.read()  # the rest of the last event
            through = True
        except ConnectionRefusedError as error:
            raise Unavailable(f"no server answers at {where}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BrokenStream(f"the answer of {where} broke off: {type(error).__name__}: {error}") from error
        finally:
            if through:
                self._idle.put(connection)
            else:
                connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            if self._tls is None:
                return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
            return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._tls)


def _given(params: SamplingParams) -> dict[str, Any]:
    """Those that are not as a server takes them anyway."""
    usual = SamplingParams()
    names = [field.name for field in fields(params) if field.name not in _NO_FIELDS]
    return {name: value for name in names if (value := getattr(params, name)) != getattr(usual, name)}


def _pieces(answer: http.client.HTTPResponse) -> Iterator[TextDelta]:
    for line in answer:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text:
            yield _piece(json.loads(text.removeprefix("data: ")))
    raise BrokenStream("the stream ended without [DONE]")


def _piece(event: dict[str, Any]) -> TextDelta:
    """Raises ClusterError for an event with an error."""
    if "error" in event:
        raise ClusterError(str(event["error"].get("message")))
    [choice] = event["choices"]
    ids = tuple(choice.get("token_ids", ()))
    found = (choice["logprobs"] or {}).get("token_logprobs", ())
    return TextDelta(
        text=choice["text"],
        token_ids=ids,
        finish_reason=choice.get("finish_reason"),
        logprobs=tuple(Logprobs(token_id, value, ()) for token_id, value in zip(ids, found, strict=bool(found))),
    )


def _refusal(answer: http.client.HTTPResponse) -> ClusterError:
    text = f"HTTP {answer.status}: {answer.read(1000).decode('utf-8', 'replace')}"
    if answer.status == 429:
        return Overloaded(text, float(answer.headers.get("retry-after", "0")))
    if answer.status == 503:
        return Unavailable(text)
    return ClusterError(text)
