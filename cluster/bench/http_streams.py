"""Streams of `/v1/completions`, for measuring: OpenAI's server-sent events, read by threads."""

import http.client
import json
import queue
from collections.abc import Iterator
from urllib.parse import urlsplit

from cluster.errors import ClusterError, Overloaded, SetupError, Unavailable
from cluster.types import SamplingParams

TIMEOUT_S = 600.0
_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "ignore_eos", "logprobs",
)  # fmt: skip


class HttpStreams:
    """address: "host:port", or a URL.  key: "" for none. For several threads; connections are used again."""

    def __init__(self, address: str, key: str = "") -> None:
        """Raises SetupError."""
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise SetupError(f"--http is {address!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise SetupError(f"--http is {address!r}, HOST:PORT or http://HOST:PORT is needed")
        self._tls = parts.scheme == "https"
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """Yields the number of tokens of each piece of an answer. Raises ClusterError."""
        fields = {name: value for name in _FIELDS if (value := getattr(params, name)) is not None}
        body = {"prompt": prompt, "stream": True, "return_token_ids": True, **fields}
        connection, through = self._connection(), False
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(answer)
            yield from _pieces(answer)
            answer.read()  # the rest of the last event
            through = True
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"no answer from {self._host}:{self._port}: {error}") from error
        finally:
            if through:
                self._idle.put(connection)
            else:
                connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
            return kind(self._host, self._port, timeout=TIMEOUT_S)


def _pieces(answer: http.client.HTTPResponse) -> Iterator[int]:
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line[6:])
        if "error" in event:
            raise ClusterError(event["error"]["message"])
        yield sum(len(choice.get("token_ids", ())) for choice in event["choices"])
    raise Unavailable("the stream ended without [DONE]")


def _refusal(answer: http.client.HTTPResponse) -> ClusterError:
    text = answer.read(1000).decode("utf-8", "replace")
    if answer.status == 429:
        return Overloaded(text, float(answer.headers.get("retry-after", "0")))
    return ClusterError(f"HTTP {answer.status}: {text}")
