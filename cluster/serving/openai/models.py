"""`/v1/models`: the one model that is served, under each of its names."""

from fastapi import APIRouter

from cluster.serving.openai.base_schema import AnswerBody
from cluster.serving.openai.served import Served

OWNER = "moe-cluster"


class ModelBody(AnswerBody):
    id: str
    object: str = "model"
    created: int
    owned_by: str = OWNER
    root: str
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

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=list(models.values()))

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelBody:
        served.check_model(model_id)
        return models[model_id]

    return routes
