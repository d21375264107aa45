"""Stands before the application: who calls, how large and how slow a body may be, and a client that leaves.

Nothing of a body is read before admission knows the caller, and nothing of it is parsed before all of it is there.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    ClusterError,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    SlowRequest,
    TooLarge,
    WrongMediaType,
)
from cluster.serving.openai.errors import response_to, status_of
from cluster.serving.service import InferenceService

log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 60.0  # for all of a body to come
MAX_OPEN_BODIES = 256  # of the largest size, that may be on their way: slow ones of many clients would fill the memory
OPEN_RETRY_S = 1.0
UNREAD_TIMEOUT_S = 120.0  # a client that takes nothing for so long counts as gone
MAX_NAME_CHARS = 96  # of a client's name for its call, `x-request-id`: a prefix and a number come to it
JSON = "application/json"
CHATS = ("/v1/chat/completions", "/v1/messages", "/v1/responses")  # paths of conversations


class Gate:
    """An ASGI application around another one, which finds the caller's name as `request.state.client`, and the call's
    as `request.state.request_id`: that of the header `x-request-id`, which Serve's server makes where a client gives
    none.

    keyless: returns whether a path is for everybody.  watched: whether calls of it stay open to follow the cluster.
    takes: returns whether a call has a function; the body of one without stays unread.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: InferenceService,
        keyless: Callable[[str], bool],
        takes: Callable[[Scope], bool],
        watched: Callable[[str], bool] = frozenset[str]().__contains__,
    ) -> None:
        self._app, self._service, self._keyless, self._takes = app, service, keyless, takes
        self._watched, self._open_bytes = watched, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # its lifespan; nothing here is a web socket
            return
        request_id = _name_of(scope) or self._service.new_request_id()
        answer = _Answer(send, request_id)
        try:
            with self._admitted(scope) as client, self._traced(scope, answer):
                scope.setdefault("state", {}).update(client=client, request_id=request_id)
                body = await self._whole_body(scope, receive)
                await _while_connected(self._app(scope, _replayed(body), answer.send), receive, answer)
        except (RequestCancelled, _Unread) as error:
            log.debug("an answer ended before its end: %s", error)
        except Exception as error:  # the boundary: nothing may pass but an error in OpenAI's shape
            if answer.begun:
                if not answer.ended:
                    log.error("an answer broke off", exc_info=error)
                return
            await response_to(error, request_id, scope["path"])(scope, receive, answer.send)

    @contextmanager
    def _admitted(self, scope: Scope) -> Iterator[str]:
        """Counts a call while it is open; yields its client, "" for a path that is for everybody."""
        headers, peer = headers_of(scope), (scope.get("client") or ("",))[0]
        admission = self._service.admission
        if self._keyless(scope["path"]):
            admission.question(headers, peer)
            yield ""
            return
        enter = admission.watcher if self._watched(scope["path"]) else admission.call
        with ExitStack() as counted:
            try:
                client = counted.enter_context(enter(headers, peer))
            except ClusterError as error:
                self._service.count_refused(error)
                raise
            yield client

    @contextmanager
    def _traced(self, scope: Scope, answer: "_Answer") -> Iterator[None]:
        """The span of a call that a client's key pays for; pages and health have none."""
        spans, path = self._service.spans, scope["path"]
        if spans is None or self._keyless(path) or self._watched(path):
            yield
            return
        method, headers = scope["method"], headers_of(scope)
        named = {"http__request__method": method, "url__path": path}
        with spans.call(method, headers, chat=path.startswith(CHATS), **named) as span:
            try:
                yield
            except Exception as error:
                if not answer.begun:
                    answer.status = status_of(error)  # the answer comes behind this span
                raise
            finally:
                route = getattr(scope.get("route"), "path", "")  # of the function that has answered
                span.by_http(f"{method} {route}", route, answer.status)

    async def _whole_body(self, scope: Scope, receive: Receive) -> bytes:
        """As `_body`; counts a refusal."""
        try:
            return await self._body(scope, receive)
        except ClusterError as error:
            self._service.count_refused(error)
            raise

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Raises Overloaded, TooLarge, WrongMediaType, SlowRequest, RequestCancelled."""
        if scope["method"] != "POST" or not self._takes(scope):
            return b""
        headers, limit = headers_of(scope), self._service.limits.max_request_bytes
        if headers.get("content-length", "0") == "0" and not headers.keys() & {"content-type", "transfer-encoding"}:
            return b""  # a call that needs none
        _check_head(headers, limit)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestCancelled("the client left")
                    piece = message.get("body", b"")
                    body += piece
                    self._open_bytes += len(piece)
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(body)
                    if self._open_bytes > MAX_OPEN_BODIES * limit:
                        raise Overloaded.later("too many large bodies are on their way", OPEN_RETRY_S)
        except TimeoutError:
            raise SlowRequest(f"the body did not come within {BODY_TIMEOUT_S:g} s") from None
        finally:
            self._open_bytes -= len(body)


class _Unread(BaseException):
    """A client that does not read. No handler of the application answers it, so it is no Exception."""


class _Answer:
    """Notes how far an answer has come, and gives a client up that does not read it. Names the call to Anthropic's
    client; Serve's server does to the others."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.begun = self.ended = False
        self.status = 0

    async def send(self, message: Message) -> None:
        """Raises _Unread."""
        self.begun = True
        if message["type"] == "http.response.start":
            self.status = message["status"]
            named = (b"request-id", self._request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), named]}
        try:
            async with asyncio.timeout(UNREAD_TIMEOUT_S):
                await self._send(message)
        except TimeoutError:
            raise _Unread(f"the client has read nothing for {UNREAD_TIMEOUT_S:g} s") from None
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)


async def _while_connected(call: Any, receive: Receive, answer: _Answer) -> None:
    """Runs a call until it ends or its client leaves. Raises RequestCancelled when the client left."""
    answering, leaving = asyncio.ensure_future(call), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise RequestCancelled("the client left")
        await answering
    finally:
        await _end((answering, leaving))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Collection["asyncio.Future[None]"]) -> None:
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


def _replayed(body: bytes) -> Receive:
    """A `receive` that gives a body which is there already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # the gate looks whether the client leaves
        raise AssertionError

    return receive


def _name_of(scope: Scope) -> str:
    """The client's name for its call; "" for none, and for one that a log would not take."""
    name = headers_of(scope).get("x-request-id", "")
    return name if len(name) <= MAX_NAME_CHARS and all("!" <= char <= "~" for char in name) else ""


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by their names in lower case, as admission takes them: a key of `x-api-key` is a bearer's."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    if "authorization" not in headers and "x-api-key" in headers:
        headers["authorization"] = f"Bearer {headers['x-api-key']}"
    return headers


def _check_head(headers: Mapping[str, str], limit: int) -> None:
    """Raises InvalidRequest, TooLarge, WrongMediaType for a body that need not be read."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise WrongMediaType(f"content-type is {kind[:100] or 'missing'}, {JSON} is needed", "request")
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise WrongMediaType(f"content-encoding is {encoding[:100]}, a body without one is needed", "request")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise InvalidRequest("content-length is no number", "request")
    if int(length[:12]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes, as many as this server reads", "request")
