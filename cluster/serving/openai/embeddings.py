"""`/v1/embeddings` and `/pooling`: vectors of prompts, or of their tokens."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest
from cluster.outcome import Computed, Head, HeadKind, Wants
from cluster.serving.openai.answer_size import BASE64_BYTES, NUMBER_BYTES, AnswerSize, worded
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.result_schema import (
    EmbeddingAnswer,
    EmbeddingData,
    EmbeddingRequest,
    Encoding,
    PoolingAnswer,
    PoolingData,
    PoolingRequest,
    Task,
)
from cluster.serving.openai.results import ResultCall, vectors
from cluster.serving.openai.served import Served
from cluster.serving.outcomes import probabilities, unit_vector

WANTS: Mapping[Task, Wants] = {
    "embed": "last_hidden_state",
    "token_embed": "hidden_states",
    "classify": "label_logits",
    "token_classify": "token_label_logits",
}
TASKS: Mapping[HeadKind, Task] = {"sequence_classification": "classify", "token_classification": "token_classify"}


def router(served: Served) -> APIRouter:
    routes, head = APIRouter(tags=["embeddings"], route_class=BodyRoute), served.service.info.head

    @routes.post("/v1/embeddings", response_model=EmbeddingAnswer)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        if body.dimensions is not None:
            raise InvalidRequest("dimensions: this model's embeddings have one size", "dimensions")
        wants: Wants = "mean_hidden_state" if body.pooling == "mean" else "last_hidden_state"
        call = ResultCall(served, request, "embd", body.model)
        computed = await call.compute(body, wants)

        def answer() -> EmbeddingAnswer:
            data = [
                EmbeddingData(index=index, embedding=_encoded(vector, body.encoding_format))
                for index, vector in enumerate(vectors(computed, body.activated))
            ]
            return EmbeddingAnswer(data=data, **call.answered(computed))

        return await worded(answer)

    @routes.post("/pooling", response_model=PoolingAnswer)
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        task = body.task or TASKS.get(head.kind, "embed")
        call = ResultCall(served, request, "pool", body.model)
        size = AnswerSize("input", "send fewer tokens in a call, or ask for encoding_format base64")
        each = BASE64_BYTES if body.encoding_format == "base64" else NUMBER_BYTES
        computed = await call.compute(body, WANTS[task], lambda one: size.add(one.numbers.array().size * each))

        def answer() -> PoolingAnswer:
            arrays = [_pooled(one, task, head, body.activated) for one in computed]
            data = [PoolingData(index=i, data=_encoded(array, body.encoding_format)) for i, array in enumerate(arrays)]
            return PoolingAnswer(data=data, **call.answered(computed))

        return await worded(answer)

    return routes


def _pooled(computed: Computed, task: Task, head: Head, activated: bool) -> np.ndarray:
    """The task's numbers of a prompt: [H], [T, H], [L] or [T, L]."""
    array = computed.numbers.array()
    if not activated:
        return array
    if task in ("classify", "token_classify"):
        rows = np.atleast_2d(array)
        return np.stack([probabilities(row, head.activation) for row in rows]).reshape(array.shape)
    return unit_vector(array) if array.ndim == 1 else np.stack([unit_vector(row) for row in array])


def _encoded(array: np.ndarray, encoding: Encoding | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()
    return array.tolist()
