"""Answers requests in this process: OpenAI's HTTP API over an `LLM`'s engine, without HTTP."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.types import ASGIApp

from cluster.batch.run import Reply, failure, reply_of
from cluster.conversation import Json
from cluster.engine.loop import EngineLoop
from cluster.errors import ClusterError, Unavailable
from cluster.llm import LLM
from cluster.metrics import IngressMetrics, new_registry
from cluster.serving.backend import UpdateStream
from cluster.serving.health import HealthState
from cluster.serving.openai.app import make_api
from cluster.serving.openai.served import Served
from cluster.serving.service import InferenceService
from cluster.serving.update_queue import UpdateQueue, follow
from cluster.types import EngineRequest, SequenceUpdate

log = logging.getLogger(__name__)

POLL_S = 1.0
CLIENT = "batch"
MAX_UNREAD_BYTES = 1 << 40  # every answer is read at once


class EngineBackend:
    """Runs requests on an engine in a thread of this process. For one event loop."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._streams: dict[str, UpdateQueue] = {}

    def generate(self, request: EngineRequest) -> UpdateStream:
        return follow(
            request.request_id,
            self._streams,
            MAX_UNREAD_BYTES,
            submit=lambda: self._loop.submit([request]),
            cancel=lambda: self._loop.cancel([request.request_id]),
        )

    async def share_out(self) -> None:
        """Hands each step's news to their streams, until it is cancelled; the engine's end ends all streams."""
        received = 0
        while True:
            try:
                received, updates = await asyncio.to_thread(self._loop.poll, POLL_S, received)
            except Exception as error:  # noqa: BLE001 the engine's thread may end by anything
                gone = ClusterError(f"the engine ended: {error}")
                for request_id, stream in self._streams.items():
                    stream.put(SequenceUpdate(request_id=request_id, finish_reason="error", error=gone))
                return
            for update in updates:
                if update.request_id in self._streams:
                    self._streams[update.request_id].put(update)


class AppAnswerer:
    """Answers by calling an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def answer(self, url: str, body: dict[str, Json]) -> Reply:
        """Never fails by the application: what that raises is its answer, or a 500 where it gave none."""
        raw = json.dumps(body).encode()
        scope: MutableMapping[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": url, "raw_path": url.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))],
            "state": {"client": CLIENT, "request_id": uuid.uuid4().hex},  # as a server's gate gives them
        }  # fmt: skip
        status, pieces = 500, bytearray()

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            pieces.extend(message.get("body", b""))

        raised: Exception | None = None
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 the boundary; Starlette raises also what it has answered
            raised = error
        try:
            return reply_of(status, bytes(pieces))
        except Unavailable as error:
            log.error("a line of a batch failed", exc_info=raised or error)
            return failure(500, "server_error", "internal error, see the log")


@asynccontextmanager
async def answerer_of(llm: LLM) -> AsyncIterator[AppAnswerer]:
    """Answers on a model's engine, which nobody else uses meanwhile."""
    loop = EngineLoop(llm.engine)
    backend = EngineBackend(loop)
    service = InferenceService(
        tokenizer=llm.tokenizer,
        info=llm.info,
        defaults=llm.sampling_defaults,
        backend=backend,
        metrics=IngressMetrics(new_registry()),
    )

    async def metrics() -> bytes:
        raise Unavailable("a batch has no metrics")

    health = HealthState()
    health.set(True)
    loop.start()
    sharing = asyncio.create_task(backend.share_out())
    try:
        await service.start()
        yield AppAnswerer(make_api(Served(service=service, health=health, metrics=metrics, now_s=time.time)))
    finally:
        sharing.cancel()
        with suppress(asyncio.CancelledError):
            await sharing
        await asyncio.to_thread(loop.stop)
