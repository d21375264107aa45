"""Keeps many requests under way, and writes each answer as it comes. Does not know who answers."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from cluster.batch.ledger import Ledger
from cluster.batch.lines import Line
from cluster.conversation import Json
from cluster.errors import Unavailable

BUSY = (429, 503)  # another moment may do
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 15.0


@dataclass(frozen=True, slots=True)
class Reply:
    """status_code: of HTTP.  body: its JSON."""

    status_code: int
    body: Json
    request_id: str = ""

    def as_json(self) -> dict[str, Json]:
        return {"status_code": self.status_code, "request_id": self.request_id, "body": self.body}


def reply_of(status: int, raw: bytes, request_id: str = "") -> Reply:
    """The reply that an answer's bytes are. Raises Unavailable for what is no JSON: a proxy's page, or half an
    answer."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Unavailable(f"the answer, status {status}, is no JSON") from None
    return Reply(status, body, request_id or (str(body.get("id") or "") if isinstance(body, dict) else ""))


def failure(status: int, kind: str, message: str) -> Reply:
    """The reply to a line that gets no other, in OpenAI's shape."""
    return Reply(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


class Answerer(Protocol):
    """Answers requests, many at a time."""

    async def answer(self, url: str, body: dict[str, Json]) -> Reply:
        """Raises Unavailable where nobody answers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """concurrency: requests at a time.  patience_s: how long one waits for a server that is busy or gone."""

    concurrency: int = 64
    patience_s: float = 120.0
    sleep: Callable[[float], "asyncio.Future[None]"] = asyncio.sleep  # type: ignore[assignment]


async def run(
    lines: Iterable[Line], answerer: Answerer, ledger: Ledger, pace: Pace, progress: Callable[[int], None]
) -> None:
    """Answers every line that has no answer yet. Raises Unavailable: the answers that came before are written.

    progress: hears how many lines are through.
    """
    under_way: set[asyncio.Task[None]] = set()
    through = 0
    try:
        for line in lines:
            if line.id in ledger.done:
                through += 1
            elif line.fault is not None:
                ledger.write(line.id, line.custom_id, line.fault)
                through += 1
            else:
                under_way.add(asyncio.create_task(_one(line, answerer, ledger, pace)))
            while len(under_way) >= pace.concurrency:
                through += await _next(under_way)
            progress(through)
        while under_way:
            through += await _next(under_way)
            progress(through)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _next(under_way: set[asyncio.Task[None]]) -> int:
    """Waits for one at least, takes it out, and raises its error."""
    done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        under_way.discard(task)
        task.result()
    return len(done)


async def _one(line: Line, answerer: Answerer, ledger: Ledger, pace: Pace) -> None:
    reply = await patient(line, answerer, pace)
    ledger.write(line.id, line.custom_id, reply.as_json())


async def patient(line: Line, answerer: Answerer, pace: Pace) -> Reply:
    """Asks again while the server is busy or gone, for as long as patience lasts. Raises Unavailable."""
    assert line.body is not None, "a line without a fault has a body"
    waited_s, wait_s = 0.0, FIRST_WAIT_S
    while True:
        reason = ""
        try:
            reply = await answerer.answer(line.url, line.body)
        except Unavailable as error:
            reason = str(error)
        except RecursionError:  # in the writer of JSON, which may go less deep than the reader did
            return failure(400, "invalid_request_error", "the body is too deep")
        else:
            if reply.status_code not in BUSY:
                return reply
            reason = f"the server answers {reply.status_code}"
        if waited_s >= pace.patience_s:
            raise Unavailable(f"{reason}, for {waited_s:.0f} s: the same command goes on where this one ended")
        await pace.sleep(wait_s)
        waited_s, wait_s = waited_s + wait_s, min(2 * wait_s, MAX_WAIT_S)
