"""Changes of the cluster by an administrator: kill a shard, rebalance, scale. Off without admin keys.

No other site's page can make a browser send them: they take JSON with a key in a header, and no cookie counts; a
browser that says where a call comes from is believed.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from cluster.errors import Forbidden, InvalidRequest
from cluster.serving.live.operations import ChangeRunner, Operations
from cluster.serving.openai.base_schema import AnswerBody, RequestBody
from cluster.serving.openai.gate import headers_of
from cluster.serving.openai.served import Served

Count = Annotated[int, Field(ge=1, le=4096)]
PATIENCE_S = 10.0  # a change that takes longer goes on without its caller
OURS = ("same-origin", "none")  # of Sec-Fetch-Site; "none": the user's own doing


class NoFields(RequestBody):
    pass


class KillShard(RequestBody):
    shard_id: Annotated[int, Field(ge=0, le=4095)]


class Scale(RequestBody):
    """One of the two."""

    expert_shards: Count | None = None
    attention_replicas: Count | None = None


class Change(AnswerBody):
    """text: what was done; what goes on still is `work` of `/cluster`."""

    state: Literal["done", "under way"]
    text: str


DONE: dict[int | str, dict[str, Any]] = {200: {"model": Change}, 202: {"model": Change}}


class Rights(AnswerBody):
    """configured: whether anybody may change the cluster by a call.  allowed: whether this caller may."""

    configured: bool
    allowed: bool
    name: str


class Changes:
    """Makes an administrator's changes, and answers when they are done, or when they take long."""

    def __init__(self, served: Served, operations: Operations) -> None:
        self._served = served
        self._runner = ChangeRunner(PATIENCE_S, operations.note)

    async def make(self, request: Request, what: str, change: Callable[[], Coroutine[Any, Any, str]]) -> JSONResponse:
        """Raises Forbidden, Overloaded, and as the change does."""
        caller = _administrator(self._served, request)
        done = await self._runner.run(what, caller, change())
        if done is None:
            return JSONResponse(Change(state="under way", text=f"{what}: it goes on").model_dump(), 202)
        return JSONResponse(Change(state="done", text=done).model_dump())


def router(served: Served) -> APIRouter:
    routes, operations = APIRouter(tags=["cluster"]), served.operations
    if operations is None:
        return routes
    changes = Changes(served, operations)

    @routes.get("/cluster/rights")
    async def rights(request: Request) -> Rights:
        """Whether this caller may change the cluster."""
        try:
            name = _administrator(served, request)
        except Forbidden:
            return Rights(configured=served.service.admission.has_admins, allowed=False, name="")
        return Rights(configured=True, allowed=True, name=name)

    @routes.post("/cluster/kill-shard", responses=DONE)
    async def kill_shard(request: Request, body: KillShard) -> JSONResponse:
        """Ends a shard's process at once, as a rehearsal of its death. The controller replaces it."""
        return await changes.make(request, f"kill shard {body.shard_id}", lambda: operations.kill_shard(body.shard_id))

    @routes.post("/cluster/rebalance", responses=DONE)
    async def rebalance(request: Request, body: NoFields) -> JSONResponse:
        """Moves experts by the measured load."""
        return await changes.make(request, "rebalance", operations.rebalance)

    @routes.post("/cluster/scale", responses=DONE)
    async def scale(request: Request, body: Scale) -> JSONResponse:
        """Adds or removes expert shards, or attention replicas, one at a time."""
        shards, replicas = body.expert_shards, body.attention_replicas
        if shards is not None and replicas is None:
            return await changes.make(request, f"{shards} expert shards", lambda: operations.scale_experts(shards))
        if replicas is not None and shards is None:
            what = f"{replicas} attention replicas"
            return await changes.make(request, what, lambda: operations.scale_attention(replicas))
        raise InvalidRequest("give expert_shards or attention_replicas, one of the two", "request")

    return routes


def _administrator(served: Served, request: Request) -> str:
    """Raises Forbidden, Overloaded."""
    headers, peer = headers_of(request.scope), (request.scope.get("client") or ("",))[0]
    if headers.get("sec-fetch-site", "none") not in OURS:
        raise Forbidden("a page of another site may not change this cluster")
    return served.service.admission.administrator(headers, peer)
