"""Calls to engines about their LoRA adapters: the list that they have, another one, and which of them are in use."""

import asyncio
import logging
from typing import Any

import ray

from cluster.config.lora import AdapterList
from cluster.errors import ClusterError, Unavailable
from cluster.status import ReplicaStatus

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0  # of an engine that is not starting
ADAPT_TIMEOUT_S = 120.0  # for an engine to read an adapter: gigabytes from a slow disk


async def in_use(replica: ReplicaStatus) -> set[int]:
    """The numbers of the adapters that an engine's requests need; none where it is gone. Raises TimeoutError."""
    engine: Any = replica.engine
    if not replica.process.takes_adapters:
        return set()
    try:
        async with asyncio.timeout(ADAPT_TIMEOUT_S):
            return set(await engine.adapters_in_use.remote())
    except ray.exceptions.RayError as error:
        log.warning("attention replica %s is gone: %s", replica.name, error)
        return set()


async def give(replica: ReplicaStatus, wanted: AdapterList, timeout_s: float | None = ADAPT_TIMEOUT_S) -> None:
    """An engine that dies over it is no failure: its successor asks for the list. Raises CheckpointError,
    Unavailable."""
    engine: Any = replica.engine
    if not replica.process.takes_adapters:
        raise Unavailable(f"attention replica {replica.name} is of an older version: roll it first")
    try:
        async with asyncio.timeout(timeout_s):
            await engine.adapt.remote(wanted)
    except TimeoutError:
        raise Unavailable(f"attention replica {replica.name} did not load it in {timeout_s:g} s") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClusterError):
            raise error.cause from None
        raise Unavailable(f"attention replica {replica.name} failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        log.warning("attention replica %s is gone: %s", replica.name, error)


async def list_of(replica: ReplicaStatus) -> AdapterList | None:
    """The adapters that an engine has; None for one that starts, is gone, or is of an older version."""
    engine: Any = replica.engine
    if not replica.process.takes_adapters:
        return None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            found: AdapterList = await engine.adapted.remote()
            return found
    except (TimeoutError, ray.exceptions.RayError) as error:
        log.info("attention replica %s does not say which adapters it has: %r", replica.name, error)
        return None
