"""Answers requests at a server that speaks OpenAI's HTTP API: a cluster's own, or another one's."""

import argparse
import os
import ssl
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from cluster.batch.run import Reply, reply_of
from cluster.client.direct import is_direct
from cluster.client.options import api_key
from cluster.client.urls import server_url
from cluster.conversation import Json
from cluster.errors import SetupError, Unauthenticated, Unavailable

CONNECT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 3600.0  # an answer without a stream shows nothing before its end


class HttpAnswerer(AbstractAsyncContextManager["HttpAnswerer"]):
    """address: "host:port", or a URL.  tls: None for the authorities that this machine trusts."""

    def __init__(self, address: str, concurrency: int, *, key: str = "", tls: ssl.SSLContext | None = None) -> None:
        """Raises SetupError."""
        parts = server_url(address, "--address", scheme="http" if tls is None else "https")
        host = parts.hostname or ""
        self._base = parts.geturl()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._concurrency, self._tls, self._direct = concurrency, tls, is_direct(host)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency, ssl=True if self._tls is None else self._tls),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
            trust_env=not self._direct,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None, "it was entered"
        await self._session.close()

    async def answer(self, url: str, body: dict[str, Json]) -> Reply:
        """Raises Unavailable, SetupError for a certificate, Unauthenticated for the key."""
        assert self._session is not None, "it was entered"
        try:
            async with self._session.post(self._base + url, json=body) as answer:
                raw, status = await answer.read(), answer.status
                request_id = answer.headers.get("x-request-id", "")
        except aiohttp.ClientConnectorCertificateError as error:
            raise SetupError(f"no trust in {self._base} ({error.certificate_error}): see --tls-ca") from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"no answer from {self._base}: {_short(error)}") from error
        if status in (401, 403):
            raise Unauthenticated(
                f"{self._base} refuses the key ({status}): set $MOE_CLUSTER_API_KEY, or give --api-key-file"
            )
        return reply_of(status, raw, request_id)


def make_http_answerer(args: argparse.Namespace, address: str) -> HttpAnswerer:
    """Of the options of a client. Raises SetupError."""
    wanted = args.tls or args.tls_ca or args.tls_cert or args.tls_key
    tls = _context(args.tls_ca, args.tls_cert, args.tls_key) if wanted else None
    return HttpAnswerer(address, args.concurrency, key=api_key(args.api_key_file), tls=tls)


def _context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    if (cert is None) != (key is None):
        raise SetupError("a client's certificate and its key belong together: give both --tls-cert and --tls-key")
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except OSError as error:  # ssl's errors too
        files = ", ".join(str(path) for path in (ca, cert, key) if path is not None)
        raise SetupError(f"{files} cannot be used for TLS: {error.strerror or error}") from error
    return context


def _short(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):  # its own text speaks of ssl:default, also without TLS
        cause = error.os_error
        number = cause.errno or 0  # negative where no address is known for a name
        return os.strerror(number) if number > 0 else cause.strerror or str(cause)
    return " ".join(str(error).split())[:200] or type(error).__name__
