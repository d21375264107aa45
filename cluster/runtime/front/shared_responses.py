"""An ingress's way to the store of responses, an actor that all ingresses of a group share.

The first response that is to be kept starts it. It is no part of the controller, which no request passes through; and
no answer waits for it but those that must be found in it.

`replace_store` gives it a new process, as `moe-cluster roll` does. Calls that come meanwhile are made again.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.errors import ClusterError, Unavailable
from cluster.runtime.front.response_store import ResponseStoreActor, carrier_actor
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import NAMESPACE, carrier_name, responses_name, shard_group
from cluster.runtime.process import shared_actor_options
from cluster.runtime.ray_private.core import by_name
from cluster.serving.openai.responses.store import (
    FOLLOW_S,
    Page,
    Progress,
    Reply,
    ResponseStore,
    StoredResponse,
    StoreLimits,
)

log = logging.getLogger(__name__)

START_S = 30.0  # for the store's process to come up
ANSWER_S = 10.0
REPLACED_S = 60.0  # for a store's successor to take what it kept
RETRY_S = 0.1
CONCURRENCY = 10_000  # questions at a time; each that follows a stream is one


class SharedResponses:
    """A `ResponseStore`. Every method raises Unavailable when the actor does not answer."""

    def __init__(self, config: ClusterConfig, gcs: GcsThread) -> None:
        self._config, self._gcs = config, gcs
        self._actor: Any | None = None

    async def put(self, stored: StoredResponse) -> str:
        return await self._ask("put", stored)  # type: ignore[no-any-return]

    async def get(self, response_id: str, client: str) -> StoredResponse:
        return await self._ask("get", response_id, client)  # type: ignore[no-any-return]

    async def follow(self, response_id: str, client: str, first: int) -> Page:
        return await self._ask("follow", response_id, client, first)  # type: ignore[no-any-return]

    async def cancel(self, response_id: str, client: str) -> StoredResponse:
        return await self._ask("cancel", response_id, client)  # type: ignore[no-any-return]

    async def delete(self, response_id: str, client: str) -> None:
        await self._ask("delete", response_id, client)

    async def report(self, news: Sequence[Progress]) -> Reply:
        return await self._ask("report", news)  # type: ignore[no-any-return]

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Waits while the store's process is being replaced; where it died, asks once again."""
        deadline, again = time.monotonic() + REPLACED_S, True
        while True:
            try:
                return await self._ask_once(method, *arguments)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ClusterError):
                    raise error.cause from None
                raise Unavailable("the store of responses failed: see its log") from error
            except (TimeoutError, ray.exceptions.RayError) as error:
                self._actor = None
                gone = isinstance(error, ray.exceptions.RayActorError)
                if not (gone and again) or time.monotonic() > deadline:
                    raise Unavailable("the store of responses does not answer: try again") from error
            again = await self._is_replaced()
            await asyncio.sleep(RETRY_S)

    async def _ask_once(self, method: str, *arguments: Any) -> Any:
        actor = await self._found()
        async with asyncio.timeout(ANSWER_S + (FOLLOW_S if method == "follow" else 0)):
            return await getattr(actor, method).remote(*arguments)

    async def _is_replaced(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._gcs.ask(_find, carrier_name(shard_group(self._config))) is not None
        except TimeoutError:
            return False

    async def _found(self) -> Any:
        """The actor; makes it where there is none."""
        if self._actor is None:
            async with asyncio.timeout(START_S):
                actor = await self._gcs.ask(_store_actor, self._config)
                await actor.attend.remote(_limits(self._config))
            self._actor = actor
        return self._actor


def response_store(config: ClusterConfig, gcs: GcsThread) -> ResponseStore | None:
    """None where none are kept."""
    return SharedResponses(config, gcs) if config.stored_responses else None


def replace_store(config: ClusterConfig) -> str:
    """Gives the store of a group's responses a process of this version, with all that it keeps; blocks. Returns what
    was done, "" where there is no store. Raises Unavailable.
    """
    group = shard_group(config)
    store = _find(responses_name(group))
    if store is None:
        return ""
    if not hasattr(store, "hand_over"):
        return "the store of responses stays: its version cannot hand over what it keeps"
    try:
        before = ray.get(store.process.remote(), timeout=ANSWER_S)
        _hand_over(store, carrier_actor(group, config.ingress_resource))
        deadline = time.monotonic() + REPLACED_S
        while _process(store) in ("", before):
            if time.monotonic() > deadline:
                raise Unavailable(f"the store of responses was not back in {REPLACED_S:g} s: see its log")
            time.sleep(RETRY_S)
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the store of responses was not replaced ({type(error).__name__}): try again") from error
    return "the store of responses has a new process"


def _hand_over(store: Any, carrier: Any) -> None:
    """Raises RayTaskError when the carrier failed."""
    try:
        ray.get(store.hand_over.remote(carrier), timeout=REPLACED_S)
    except ray.exceptions.RayTaskError:  # may be a RayActorError too: the carrier's
        raise
    except ray.exceptions.RayActorError:
        log.debug("the store's process has ended before it answered, as it should")


def _process(store: Any) -> str:
    """Empty while it is being replaced."""
    try:
        return str(ray.get(store.process.remote(), timeout=ANSWER_S))
    except ray.exceptions.RayActorError:
        return ""


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError:
        return None


def _limits(config: ClusterConfig) -> StoreLimits:
    return StoreLimits(
        max_bytes=config.stored_responses_bytes,
        max_responses=config.stored_responses,
        max_age_s=config.stored_responses_age_s,
    )


def _store_actor(config: ClusterConfig) -> Any:
    group = shard_group(config)
    return (
        ray.remote(by_name(ResponseStoreActor))
        .options(
            name=responses_name(group),
            namespace=NAMESPACE,
            max_concurrency=CONCURRENCY,
            **shared_actor_options(group, config.ingress_resource),
        )
        .remote(group)
    )
