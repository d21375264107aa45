"""Streams of `/v1/completions`: OpenAI's server-sent events, for measuring and for chaos. Read by threads."""

import http.client
import json
import queue
import socket
import ssl
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from typing import Any

from cluster.client.going_on import Patience, going_on, seeded
from cluster.client.urls import server_url
from cluster.errors import BrokenStream, ClusterError, Overloaded, ProtocolError, SetupError, Unavailable
from cluster.inputs import shown
from cluster.types import Logprobs, SamplingParams, TextDelta

TIMEOUT_S = 600.0  # between two bytes of an answer
DONE = b"data: [DONE]"
AWAY = (502, 503, 504)  # statuses of a server that is not there now: HAProxy's own, and ours
AWAY_CODE = "service_unavailable"  # of an error in a stream that has begun, as `serving.openai.errors` sends it
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
        self._host, self._port, self._where = parts.hostname or "", parts.port, parts.netloc
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
        try:
            self._connect(connection)
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(answer)
            yield from _pieces(answer)
            answer.read()  # the rest of the last event
            through = True
        except (OSError, http.client.HTTPException) as error:
            raise BrokenStream(f"the answer of {self._where} broke off: {type(error).__name__}: {error}") from error
        finally:
            if through:
                self._idle.put(connection)
            else:
                connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        """Raises Unavailable; SetupError where no later try would go better."""
        if connection.sock is not None:
            return
        try:
            connection.connect()
        except ConnectionRefusedError as error:
            raise Unavailable(f"no server answers at {self._where}") from error
        except socket.gaierror as error:
            raise Unavailable(f"no host is known for {self._where} ({error.strerror}): see --http") from error
        except UnicodeError as error:
            raise SetupError(f"{self._where} is the name of no host ({error}): see --http") from error
        except ssl.SSLCertVerificationError as error:
            raise SetupError(f"no trust in {self._where} ({error.strerror}): see --tls-ca") from error
        except ssl.SSLEOFError as error:
            raise Unavailable(f"{self._where} hung up before it spoke TLS") from error
        except ssl.SSLError as error:
            raise SetupError(f"no TLS with {self._where} ({error.strerror}): does that server speak it?") from error
        except OSError as error:
            raise Unavailable(f"no connection to {self._where}: {error.strerror or error}") from error

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
    """Raises BrokenStream, ProtocolError, and the server's own error."""
    for line in answer:
        if not line.endswith(b"\n"):
            raise BrokenStream("the stream broke off inside of an event")
        text = line.strip()
        if text == DONE:
            return
        if text:
            yield _piece(text)
    raise BrokenStream("the stream ended without [DONE]")


def _piece(text: bytes) -> TextDelta:
    """Raises ProtocolError, and the server's own error."""
    try:
        event = json.loads(text.removeprefix(b"data: "))
        if "error" in event:
            raise _failure(event["error"])
        [choice] = event["choices"]
        ids = tuple(choice.get("token_ids", ()))
        found = (choice["logprobs"] or {}).get("token_logprobs", ())
        return TextDelta(
            text=choice["text"],
            token_ids=ids,
            finish_reason=choice.get("finish_reason"),
            logprobs=tuple(Logprobs(token_id, value, ()) for token_id, value in zip(ids, found, strict=bool(found))),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProtocolError(
            f"the server sends no events of /v1/completions, but {shown(text)}: does it speak OpenAI's API?"
        ) from error


def _failure(error: Any) -> ClusterError:
    """The error that ends a stream."""
    message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
    return Unavailable(str(message)) if code == AWAY_CODE else ClusterError(str(message))


def _refusal(answer: http.client.HTTPResponse) -> ClusterError:
    text = f"HTTP {answer.status}: {' '.join(answer.read(1000).decode('utf-8', 'replace').split())}"
    if answer.status == 429:
        hint = answer.headers.get("retry-after", "")
        return Overloaded(text, float(hint) if hint.isdecimal() else 0.0)
    return Unavailable(text) if answer.status in AWAY else ClusterError(text)
