"""Asks the questions of `moe-cluster chaos` over HTTP: streams of `/v1/completions`."""

import json
import ssl
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import fields
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from cluster.client.direct import is_direct
from cluster.errors import ClusterError, SetupError, Unavailable
from cluster.types import Logprobs, SamplingParams, TextDelta

TIMEOUT_S = 300.0  # between two bytes of an answer
_NO_FIELDS = ("structured_outputs", "logit_bias")  # of a body; questions have none


class HttpAsker:
    """url: of a server, "http://HOST:PORT". Tries nothing again: a server that lasts needs no patience."""

    def __init__(self, url: str, *, key: str = "", tls: ssl.SSLContext | None = None) -> None:
        """Raises SetupError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(f"--http is {url!r}, http://HOST:PORT is needed")
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/completions"
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=tls)]
        if is_direct(parts.hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[TextDelta]:
        """Yields the pieces of an answer. Raises ClusterError, also for a stream that ends before its end."""
        body = {
            "prompt": list(prompt), "stream": True, "return_token_ids": True,
            **{field.name: getattr(params, field.name) for field in fields(params) if field.name not in _NO_FIELDS},
        }  # fmt: skip
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                for line in answer:
                    text = line.decode().strip()
                    if text == "data: [DONE]":
                        return
                    if text:
                        yield _piece(json.loads(text.removeprefix("data: ")))
        except HTTPError as error:
            raise ClusterError(f"{error.code}: {error.read(1000).decode(errors='replace')}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise Unavailable(f"the answer of {self._url} broke off: {type(error).__name__}: {error}") from error
        raise Unavailable(f"the answer of {self._url} ended without [DONE]")


def _piece(event: dict[str, Any]) -> TextDelta:
    """Raises ClusterError for an event with an error."""
    if "error" in event:
        raise ClusterError(str(event["error"].get("message")))
    [choice] = event["choices"]
    ids = tuple(choice["token_ids"])
    found = (choice["logprobs"] or {}).get("token_logprobs", ())
    return TextDelta(
        text=choice["text"],
        token_ids=ids,
        logprobs=tuple(Logprobs(token_id, value, ()) for token_id, value in zip(ids, found, strict=bool(found))),
    )
