"""An ingress's way to the store of responses, an actor that all ingresses of a group share.

The first response that is to be kept starts it. It is no part of the controller, which no request passes through and
which gets a new process with each `moe-cluster roll`; and no answer waits for it but those that must be found in it.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.errors import ClusterError, Unavailable
from cluster.runtime.front.response_store import ResponseStoreActor
from cluster.runtime.names import NAMESPACE, responses_name, shard_group
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

START_S = 30.0  # for the store's process to come up
ANSWER_S = 10.0
CONCURRENCY = 10_000  # questions at a time; each that follows a stream is one


class SharedResponses:
    """A `ResponseStore`. Every method raises Unavailable when the actor does not answer."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
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
        try:
            actor = await self._found()
            async with asyncio.timeout(ANSWER_S + (FOLLOW_S if method == "follow" else 0)):
                return await getattr(actor, method).remote(*arguments)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ClusterError):
                raise error.cause from None
            raise Unavailable("the store of responses failed: see its log") from error
        except (TimeoutError, ray.exceptions.RayError) as error:
            self._actor = None
            raise Unavailable("the store of responses does not answer: try again") from error

    async def _found(self) -> Any:
        """The actor; makes it where there is none."""
        if self._actor is None:
            async with asyncio.timeout(START_S):
                actor = await asyncio.to_thread(_store_actor, self._config)
                await actor.attend.remote(_limits(self._config))
            self._actor = actor
        return self._actor


def response_store(config: ClusterConfig) -> ResponseStore | None:
    """None where none are kept."""
    return SharedResponses(config) if config.stored_responses else None


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
