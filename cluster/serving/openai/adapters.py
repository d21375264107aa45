"""vLLM's calls that load and unload LoRA adapters, by an administrator. Off without admin keys."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from cluster.serving.openai.base_schema import RequestBody
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.changes import DONE, Changes
from cluster.serving.openai.served import Served


class LoadAdapter(RequestBody):
    """lora_path: of its directory, the same on every node.  load_inplace: instead of another one of that name."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapter(RequestBody):
    lora_name: str


def router(served: Served) -> APIRouter:
    routes, operations = APIRouter(tags=["models"], route_class=BodyRoute), served.operations
    if operations is None:
        return routes
    changes = Changes(served, operations)

    @routes.post("/v1/load_lora_adapter", responses=DONE)
    async def load_lora_adapter(request: Request, body: LoadAdapter) -> JSONResponse:
        """Loads an adapter at all attention replicas; requests name it as their model from then on."""
        return await changes.make(
            request,
            f"load adapter {body.lora_name[:100]!r}",
            lambda: operations.load_adapter(body.lora_name, body.lora_path, in_place=bool(body.load_inplace)),
        )

    @routes.post("/v1/unload_lora_adapter", responses=DONE)
    async def unload_lora_adapter(request: Request, body: UnloadAdapter) -> JSONResponse:
        """Unloads an adapter. Requests that run with it go on to their end."""
        what = f"unload adapter {body.lora_name[:100]!r}"
        return await changes.make(request, what, lambda: operations.unload_adapter(body.lora_name))

    return routes
