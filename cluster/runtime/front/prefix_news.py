"""Tells each ingress which beginnings of prompts its attention replica has taken from the others. Knows no Serve.

Nobody asks: the news go with the first word of an answer.
"""

from collections import deque
from collections.abc import Sequence

from cluster.outcome import EVERY_ROW
from cluster.runtime.front.prefix_balancer import digests_of
from cluster.types import EngineRequest

MAX_NEWS = 64  # requests; of 4,096 tokens each they are 60 KB
MAX_INGRESSES = 1024  # heard of; those that are gone stay until then


class PrefixNews:
    """For one event loop. A request without an ingress is of one that asks for no news, and is none."""

    def __init__(self) -> None:
        self._news: deque[tuple[int, str, bytes]] = deque(maxlen=MAX_NEWS)  # number, ingress, digests
        self._next = 0
        self._heard: dict[str, int] = {}  # by ingress, the number of its next news; that of the longest silence first

    def taken(self, request: EngineRequest) -> tuple[bytes, ...]:
        """Notes a prompt; returns what others have sent since its ingress sent the last one: of each the digests of its
        beginnings, one after another."""
        if not request.ingress:
            return ()
        first = self._heard.pop(request.ingress, 0)
        news = tuple(
            digests for number, ingress, digests in self._news if number >= first and ingress != request.ingress
        )
        self._heard[request.ingress] = self._next
        if len(self._heard) > MAX_INGRESSES:
            del self._heard[next(iter(self._heard))]
        self._add(request, ())
        return news

    def answered(self, request: EngineRequest, output_token_ids: Sequence[int]) -> None:
        """Notes an answer, as far as it has come: the next turn of a conversation begins with it."""
        if request.ingress and output_token_ids:
            self._add(request, output_token_ids)

    def _add(self, request: EngineRequest, output_token_ids: Sequence[int]) -> None:
        if len(self._heard) < 2 or request.wants in EVERY_ROW:
            return
        every = (*request.prompt_token_ids, *request.output_token_ids, *output_token_ids)
        if digests := digests_of(every, request.adapter):
            self._news.append((self._next, request.ingress, b"".join(digests)))
            self._next += 1
