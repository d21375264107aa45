"""`/classify` and `/score`: labels of prompts, and how well two texts go together."""

import numpy as np
from fastapi import APIRouter, Request

from cluster.errors import InvalidRequest
from cluster.serving.openai.prompts import MAX_PROMPTS
from cluster.serving.openai.result_schema import (
    ClassAnswer,
    ClassData,
    InputRequest,
    ScoreAnswer,
    ScoreData,
    ScoreRequest,
)
from cluster.serving.openai.results import ResultCall, vectors
from cluster.serving.openai.served import Served
from cluster.serving.outcomes import probabilities
from cluster.serving.text.prompts import Prompt


def router(served: Served) -> APIRouter:
    routes, head = APIRouter(tags=["classes"]), served.service.info.head

    @routes.post("/classify")
    async def classify(body: InputRequest, request: Request) -> ClassAnswer:
        call = ResultCall(served, request, "classify")
        computed = await call.compute(body, "label_logits")
        data = []
        for index, one in enumerate(computed):
            logits = one.numbers.array()
            probs = probabilities(logits, head.activation).tolist()
            label = head.labels[int(logits.argmax())]
            data.append(ClassData(index=index, label=label, probs=probs, num_classes=len(probs)))
        return ClassAnswer(data=data, **call.answered(computed))

    @routes.post("/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreAnswer:
        """A head with one label scores both texts, one behind the other; any other model compares their embeddings."""
        call, pairs = ResultCall(served, request, "score"), _pairs(body)
        served.check_model(body.model)
        if head.kind == "sequence_classification" and len(head.labels) == 1:
            computed = await call.compute_each([Prompt(text=first + second) for first, second in pairs], "label_logits")
            scores = [float(1 / (1 + np.exp(-one.numbers.array().astype(np.float64)[0]))) for one in computed]
        else:
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            computed = await call.compute_each([Prompt(text=text) for text in texts], "last_hidden_state")
            of_text = dict(zip(texts, vectors(computed, None), strict=True))
            scores = [float(of_text[first] @ of_text[second]) for first, second in pairs]
        data = [ScoreData(index=index, score=one) for index, one in enumerate(scores)]
        return ScoreAnswer(data=data, **call.answered(computed))

    return routes


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Raises InvalidRequest."""
    first, second = ([one] if isinstance(one, str) else one for one in (body.text_1, body.text_2))
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second) or not 1 <= len(first) <= MAX_PROMPTS:
        raise InvalidRequest(
            f"text_1 has {len(first)} texts and text_2 {len(second)}: one, or as many as text_2, are needed, "
            f"at most {MAX_PROMPTS}",
            "text_1",
        )
    return list(zip(first, second, strict=True))
