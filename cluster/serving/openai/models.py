"""`/v1/models`: the one model that is served, under each of its names."""

from fastapi import APIRouter

from cluster.serving.openai.base_schema import AnswerBody
from cluster.serving.openai.served import Served

OWNER = "moe-cluster"


class ModelBody(AnswerBody):
    """parent: of an adapter, its base."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = OWNER
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(AnswerBody):
    object: str = "list"
    data: list[ModelBody]


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["models"])
    info, since_s = served.service.info, int(served.now_s())
    models = {
        name: ModelBody(id=name, created=since_s, root=info.model_id, max_model_len=info.max_model_len)
        for name in served.model_names
    }

    def adapted(name: str) -> ModelBody:
        return ModelBody(id=name, created=since_s, root=name, parent=info.model_id, max_model_len=info.max_model_len)

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        adapters = [adapted(name) for name in sorted(served.service.adapters()) if name not in models]
        return ModelList(data=[*models.values(), *adapters])

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelBody:
        served.adapter_of(model_id)
        return models.get(model_id) or adapted(model_id)

    return routes
