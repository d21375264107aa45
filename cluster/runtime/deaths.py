"""Waits for an actor's death. Ray also reports an actor that it cannot reach for a moment, which may live."""

import asyncio
import logging
from typing import Any

import ray

log = logging.getLogger(__name__)

FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0  # between two questions to an actor that Ray cannot reach


class Pauses:
    """Waits longer each time, up to MAX_PAUSE_S."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    async def pause(self) -> None:
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, MAX_PAUSE_S)
        await asyncio.sleep(pause_s)

    def over(self) -> None:
        """The actor has answered: the next pause is a short one."""
        self._next_s = FIRST_PAUSE_S


async def until_dead(actor: Any, name: str) -> bool:
    """Returns true when Ray says that an actor has died. name: for the log.

    actor: its `hold` never answers; false where it does.
    """
    pauses = Pauses()
    while True:
        try:
            await actor.hold.remote()
            return False
        except ray.exceptions.ActorUnavailableError as error:
            log.info("%s cannot be reached, perhaps for a moment: %s", name, type(error).__name__)
            await pauses.pause()
        except ray.exceptions.RayActorError:
            return True
