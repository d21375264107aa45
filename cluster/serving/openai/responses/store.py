"""Where responses are kept after their calls, and while nobody waits for them. Knows no Ray and no HTTP.

A response is two JSON texts and the events of its stream; what stands in them is the front's business. Only the client
that made a response gets it back. `ResponseStore` is the seam: `kept.KeptResponses` keeps them in this process, and
`runtime/front/response_store.py` puts one of these into a process that all ingresses ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import NotFound
from cluster.evolving import evolving

FOLLOW_S = 10.0  # in which a question for more events is answered, with or without
LOST_S = 30.0  # a running response of which nothing is heard for so long has lost its process
ID = "response_id"
_WIRE = "cluster.serving.openai.responses.store"


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """The oldest response goes when there are more."""

    max_bytes: int = 256 << 20
    max_responses: int = 10_000
    max_age_s: float = 86_400.0


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """response, items: JSON; items is the conversation that the response answers.
    events: the texts of its stream's events but the last; None: it is no stream. `get` gives none: `follow` does.
    running: some process goes on with it.  ending: "cancelled" or "lost" where the store knows it, the text may not.
    """

    response_id: str
    client: str
    response: str
    items: str
    events: tuple[str, ...] | None = None
    running: bool = False
    ending: str = ""


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running response is. events: those from `first` on; the store may have some of them."""

    response_id: str
    response: str
    first: int = 0
    events: tuple[str, ...] = ()
    ended: bool = False


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """store_id: another one when another store answers, which knows nothing of what was told to the one before.
    stop: responses that nobody wants any more.
    """

    store_id: str
    stop: tuple[str, ...] = ()


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Events of a stream from a place on; none: nothing came for a while.

    num_events: of the stream so far.  ended: there will be no more.
    """

    events: tuple[str, ...]
    num_events: int
    ended: bool


@evolving(_WIRE)
@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Some of all that a store has, oldest first, for its successor; ages_s: of each response."""

    store_id: str
    limits: StoreLimits = StoreLimits()
    responses: tuple[StoredResponse, ...] = ()
    ages_s: tuple[float, ...] = ()


class ResponseStore(Protocol):
    """Every method may raise Unavailable. NotFound: it is not there, or another client's."""

    async def put(self, stored: StoredResponse) -> str:
        """Keeps a response; returns the store's id. Raises Overloaded when running ones fill the store."""

    async def get(self, response_id: str, client: str) -> StoredResponse:
        """Raises NotFound."""

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        """Returns the events from `first` on as soon as there are some. Raises NotFound."""

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        """Ends a running response; one that has ended stays as it is. Raises NotFound."""

    async def delete(self, response_id: str, client: str) -> None:
        """Raises NotFound."""

    async def report(self, news: Sequence[Progress]) -> Reply:
        """Takes note of running responses: call it for each every few seconds, also without news."""


class NoStore:
    """A `ResponseStore` that keeps nothing."""

    async def put(self, stored: StoredResponse) -> str:
        raise self._refusal()

    async def get(self, response_id: str, client: str) -> StoredResponse:
        raise self._refusal()

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        raise self._refusal()

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        raise self._refusal()

    async def delete(self, response_id: str, client: str) -> None:
        raise self._refusal()

    async def report(self, news: Sequence[Progress]) -> Reply:
        raise self._refusal()

    def _refusal(self) -> NotFound:
        return NotFound("this server keeps no responses: stored_responses is 0", ID)
