"""Remembers which attention replicas have computed which beginnings of prompts, and names those that a request should
go to.

Knows no Serve and no load: it says how much busier than others a replica may be, and `SharedPromptRouter` looks.
Ingresses hear of one another from the replicas (`prefix_news`), and may be late. Where several replicas are as good, or
none is known, the request's own tokens choose, so that the ingresses choose alike.
"""

import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice, pairwise
from typing import Literal

from cluster.outcome import EVERY_ROW
from cluster.types import EngineRequest

STEP = 16  # tokens; a block of the cache, by default
STEPS = 32  # further on a step is at most this part of the beginning that it ends: 115 digests for 4,096 tokens
DIGEST_BYTES = 8
MAX_TOKENS = 1 << 16  # of a beginning that is looked at: 1 ms
MAX_DIGESTS = 1 << 16  # remembered: 570 prompts of 4,096 tokens, 9 MB
MAX_REPLICAS = 8  # remembered of a beginning, the latest
# Requests more than at a replica chosen by load alone that the longest beginning is worth. Of 1, 4 and 16 one gives
# shared beginnings twice the time to a first token, and 16 conversations 1.6 times the slowest tenth's (BENCHMARKS.md).
MAX_EXCESS = 4
TOKENS_A_REQUEST = 64  # that a beginning needs for each of these: shared starts of chat templates are worth none

Outcome = Literal["hit", "busy", "new"]


def _stops() -> tuple[int, ...]:
    """The lengths of the beginnings that are looked at."""
    stops = [STEP]
    while stops[-1] < MAX_TOKENS:
        stops.append(stops[-1] + max(STEP, stops[-1] // STEPS // STEP * STEP))
    return tuple(stops)


STOPS = _stops()


def digests_of(token_ids: Iterable[int], adapter: str = "") -> list[bytes]:
    """Returns a digest of each beginning of STOPS tokens. Those of different adapters differ."""
    numbers = array("I", islice(token_ids, STOPS[-1]))
    digest = blake2b(adapter.encode(), digest_size=DIGEST_BYTES)
    digests = []
    for start, stop in pairwise((0, *STOPS)):
        if stop > len(numbers):
            break
        digest.update(numbers[start:stop])
        digests.append(digest.digest())
    return digests


@dataclass(slots=True)
class Choice:
    """Where one request should go. request: as it is sent.

    wanted: names with the number of requests that each may have more than a replica chosen by load, the best first;
    "" for any. As `SharedPromptRouter` reads it.
    known: the replicas that have its longest known beginning.
    """

    request: EngineRequest
    wanted: str = ""
    digests: Sequence[bytes] = ()
    known: Sequence[str] = ()
    replica: str = ""
    output_token_ids: list[int] = field(default_factory=list)

    def outcome(self) -> Outcome:
        if not self.known:
            return "new"
        return "hit" if self.replica in self.known else "busy"


class PrefixBalancer:
    """For one event loop.

    on: false chooses nothing.  name: of its ingress, by default a new one.  count: called with each choice's outcome.
    """

    def __init__(self, *, on: bool = True, name: str = "", count: Callable[[Outcome], None] = lambda _: None) -> None:
        self._on = on
        self._name = name or uuid.uuid4().hex
        self._count = count
        self._names: dict[str, None] = {}  # of the replicas that there are, in order
        self._places: dict[bytes, tuple[str, ...]] = {}  # by digest, that of the longest unused first

    def serve(self, replicas: Iterable[str]) -> None:
        """Takes the names of the replicas that there are now."""
        self._names = dict.fromkeys(sorted(replicas))

    def choose(self, request: EngineRequest) -> Choice:
        """Of requests whose whole prompt is computed in any case, of short ones, and among fewer than two replicas
        there is no choice. One that goes on elsewhere goes anywhere: its replica may not know that it stops."""
        if not self._on or len(self._names) < 2 or request.wants in EVERY_ROW:
            return Choice(request)
        request = replace(request, ingress=self._name)
        digests = digests_of(chain(request.prompt_token_ids, request.output_token_ids), request.adapter)
        if not digests or request.num_replays:
            return Choice(request, digests=digests)
        index, known = self._longest(digests)
        if not known:
            return Choice(request, wanted=f"{_in_turn(tuple(self._names), digests[0])[0]}+1", digests=digests)
        excess = min(MAX_EXCESS, STOPS[index] // TOKENS_A_REQUEST)
        names = _in_turn(known, digests[min(index + 1, len(digests) - 1)])
        bounds = (excess,) if len(names) == 1 else sorted({min(1, excess), excess})
        wanted = " ".join(f"{name}+{bound}" for bound in bounds for name in names)
        return Choice(request, wanted=wanted, digests=digests, known=names)

    def taken(self, choice: Choice, replica: str, news: Iterable[bytes] = ()) -> None:
        """Notes the replica that has taken a request: it will have its beginnings, and has those of its news, which
        other ingresses sent (`PrefixNews.taken`)."""
        choice.replica = replica
        for digests in news:
            self._note([digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)], replica)
        if choice.digests:
            self._count(choice.outcome())
            self._note(choice.digests, replica)

    def ended(self, choice: Choice) -> None:
        """Notes that the replica has the answer behind the prompt, too: the next turn of a conversation begins with
        both."""
        if choice.digests and choice.replica and choice.output_token_ids:
            request = choice.request
            every = chain(request.prompt_token_ids, request.output_token_ids, choice.output_token_ids)
            self._note(digests_of(every, request.adapter), choice.replica)

    def _longest(self, digests: Sequence[bytes]) -> tuple[int, list[str]]:
        """The number of the longest known beginning, and the replicas that have it, those that are still there."""
        for index in reversed(range(len(digests))):
            known = sorted(name for name in self._places.get(digests[index], ()) if name in self._names)
            if known:
                return index, known
        return 0, []

    def _note(self, digests: Sequence[bytes], replica: str) -> None:
        """The shortest beginning last: more prompts share it."""
        for digest in reversed(digests):
            others = (name for name in self._places.pop(digest, ()) if name != replica)
            self._places[digest] = (*others, replica)[-MAX_REPLICAS:]
        while len(self._places) > MAX_DIGESTS:
            del self._places[next(iter(self._places))]


def _in_turn(names: Sequence[str], digest: bytes) -> list[str]:
    """The names from one on that the digest chooses: the same at all ingresses."""
    first = int.from_bytes(digest) % len(names)
    return [*names[first:], *names[:first]]
