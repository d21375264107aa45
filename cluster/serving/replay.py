"""Requests that outlive their attention replica: what a client already has is given to another one, which goes on.

Knows no network and no Ray. Sampling depends on nothing but seed, position and the tokens before it, so the answer is
the one that the first replica would have given.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from cluster.errors import Overloaded, PoisonedRequest, ReplicaStopping, ReplicaUnavailable
from cluster.serving.service import GenerationBackend
from cluster.types import EngineRequest, SequenceUpdate

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.2  # between two tries to find room for a request that was let in before


class ReplayingBackend:
    """A backend over one that raises ReplicaUnavailable, or says so in an update, when a replica dies.

    max_replays: how often a request goes on elsewhere without a new token in between; then it is held to kill replicas.
    room_timeout_s: how long a request that was let in looks for room at another replica.  on_replay: for each.
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
        """No token twice, none missing. Raises PoisonedRequest, and what the replicas refuse a new request with."""
        arrived_at = self._clock()
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=self._seeds.getrandbits(63)))
        given: list[int] = []
        attempt = fruitless = 0
        lost_at = arrived_at
        while True:
            try:
                async with aclosing(
                    self._replicas.generate(self._resumed(request, given, attempt, arrived_at))
                ) as news:
                    async for update in news:
                        if isinstance(update.error, ReplicaUnavailable):
                            raise update.error
                        given += update.token_ids
                        fruitless = 0 if update.token_ids else fruitless
                        yield replace(update, request_id=request.request_id)
                        if update.finish_reason is not None:
                            return
                raise ReplicaUnavailable("the attention replica ended its stream without a reason")
            except (Overloaded, ReplicaStopping) as error:
                if (isinstance(error, Overloaded) and not attempt) or self._clock() - lost_at > self._room_timeout_s:
                    raise
                attempt += 1
                await self._sleep(RETRY_INTERVAL_S)
            except ReplicaUnavailable as error:
                fruitless += 1
                if fruitless > self._max_replays:
                    raise PoisonedRequest(
                        f"request {request.called} lost {fruitless} attention replicas in a row "
                        f"without a new token ({len(given)} generated): it is not tried again"
                    ) from error
                log.info("request %s goes on elsewhere after %d tokens: %s", request.called, len(given), error)
                self._on_replay()
                attempt, lost_at = attempt + 1, self._clock()

    def _resumed(self, request: EngineRequest, given: list[int], attempt: int, arrived_at: float) -> EngineRequest:
        """A replica that was told to cancel the earlier attempt must not take this one for it: it has its own id."""
        if not attempt:
            return request
        timeout_s = request.timeout_s
        return replace(
            request,
            request_id=f"{request.request_id}#{attempt}",
            output_token_ids=tuple(given),
            num_replays=attempt,
            timeout_s=None if timeout_s is None else max(0.001, timeout_s - (self._clock() - arrived_at)),
        )
