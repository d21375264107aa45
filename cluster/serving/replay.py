"""Lets requests outlive their attention replica: another one gets the tokens that the client has, and goes on.

Knows no network and no Ray. Sampling depends only on the seed, the position and the tokens before it, so the answer is
the one that the first replica would have given.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.errors import Overloaded, PoisonedRequest, ReplicaStopping, ReplicaUnavailable
from cluster.serving.backend import GenerationBackend
from cluster.types import EngineRequest, SequenceUpdate

log = logging.getLogger(__name__)

UNTRACED_DEATHS = 4  # times as many as of those at its own steps: what others do to engines must not end a request
RETRY_INTERVAL_S = 0.2  # between two tries to find room for a request that was let in before


@dataclass(slots=True)
class Deaths:
    """Counts the deaths of replicas that one request may have caused.

    at_this_token: since its last new token.  proven: the last death proves that the request caused it.
    in_a_row: deaths since its last new token, those included that found the engine at others.
    """

    total: int = 0
    at_this_token: int = 0
    proven: bool = False
    in_a_row: int = 0

    def add(self, num_in_step: int | None) -> None:
        """num_in_step: as in ReplicaUnavailable."""
        self.in_a_row += 1
        if num_in_step == 0:
            return  # the engine computed others
        self.total += 1
        self.at_this_token += 1
        self.proven = self.at_this_token > 1 and num_in_step == 1

    def progressed(self) -> None:
        """Notes a new token."""
        self.at_this_token, self.proven, self.in_a_row = 0, False, 0

    def are_its_fault(self, max_replays: int) -> bool:
        """Also where no step shows it: a request may kill engines in ways that leave no trace."""
        untraced = UNTRACED_DEATHS * max(1, max_replays)
        return self.proven or self.at_this_token > max_replays or self.in_a_row > untraced

    @property
    def num_alone_tokens(self) -> int:
        """Returns how many tokens a suspect computes alone: one, and more after each further death."""
        return 4 ** (self.total - 1) if self.at_this_token else 0


class ReplayingBackend:
    """A backend over one that raises ReplicaUnavailable, or sends it in an update, when a replica dies.

    max_replays: times that a request goes on elsewhere without a new token in between; after that it is taken to kill
        replicas. UNTRACED_DEATHS of engines that computed only others count as one. The death of one that computed this
        request alone, after another engine had died at the same token, is proof.
    room_timeout_s: time for an admitted request to find room at another replica.  on_replay: called at each replay.
    """

    def __init__(
        self,
        replicas: GenerationBackend,
        *,
        max_replays: int,
        room_timeout_s: float,
        on_replay: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        seeds: random.Random | None = None,
    ) -> None:
        self._replicas = replicas
        self._max_replays = max_replays
        self._room_timeout_s = room_timeout_s
        self._on_replay = on_replay
        self._clock = clock
        self._sleep = sleep
        self._seeds = seeds or random.Random()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[SequenceUpdate, None]:
        """Yields each token once, from the first one that the client lacks. Raises PoisonedRequest, and the replicas'
        errors for a new request."""
        arrived_at = self._clock()
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=self._seeds.getrandbits(63)))
        given = list(request.output_token_ids)
        attempt = 0
        deaths = Deaths()
        lost_at = arrived_at
        while True:
            try:
                resumed = self._resumed(request, given, attempt, deaths, arrived_at)
                async with aclosing(self._attempt(resumed, given, deaths)) as updates:
                    async for update in updates:
                        yield replace(update, request_id=request.request_id)
                return
            except (Overloaded, ReplicaStopping) as error:
                if (isinstance(error, Overloaded) and not attempt) or self._clock() - lost_at > self._room_timeout_s:
                    raise
                attempt += 1
                await self._sleep(RETRY_INTERVAL_S)
            except ReplicaUnavailable as error:
                deaths.add(error.num_in_step)
                if deaths.are_its_fault(self._max_replays):
                    raise PoisonedRequest(
                        f"request {request.called} is not tried again: {deaths.in_a_row} attention replicas died "
                        f"in a row while they had it, without a new token ({len(given)} generated)"
                        + (", the last one with nothing else in its step" if error.num_in_step == 1 else "")
                    ) from error
                log.info("request %s goes on elsewhere after %d tokens: %s", request.called, len(given), error)
                self._on_replay()
                attempt, lost_at = attempt + 1, self._clock()

    async def _attempt(
        self, request: EngineRequest, given: list[int], deaths: Deaths
    ) -> AsyncGenerator[SequenceUpdate, None]:
        """Yields the updates of one replica, to the last one. Raises the errors of a replica that dies or refuses.

        given: gets the new tokens.
        """
        async with aclosing(self._replicas.generate(request)) as updates:
            async for update in updates:
                death = update.error if isinstance(update.error, ReplicaUnavailable) else None
                if death is not None:  # the same update has the last tokens too
                    update = replace(update, finish_reason=None, error=None)
                if update.token_ids:
                    given += update.token_ids
                    deaths.progressed()
                if update.token_ids or death is None:
                    yield update
                if death is not None:
                    raise death
                if update.finish_reason is not None:
                    return
        raise ReplicaUnavailable("the attention replica ended its stream without a reason")

    def _resumed(
        self, request: EngineRequest, given: list[int], attempt: int, deaths: Deaths, arrived_at: float
    ) -> EngineRequest:
        """Returns the request for one attempt. It has a new id, so that a replica that shall cancel an earlier attempt
        does not cancel this one."""
        if not attempt:
            return request
        timeout_s = request.timeout_s
        return replace(
            request,
            request_id=f"{request.request_id}#{attempt}",
            output_token_ids=tuple(given),
            num_replays=attempt,
            num_alone_tokens=deaths.num_alone_tokens,
            timeout_s=None if timeout_s is None else max(0.001, timeout_s - (self._clock() - arrived_at)),
        )
