"""`/classify`, `/score` and `/rerank`: labels of prompts, and how well texts go together."""

from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request

from cluster.errors import InvalidRequest
from cluster.outcome import Computed, Head
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.prompts import MAX_PROMPTS
from cluster.serving.openai.result_schema import (
    ActivatedRequest,
    ClassAnswer,
    ClassData,
    RerankAnswer,
    RerankDocument,
    RerankRequest,
    RerankResult,
    ScoreAnswer,
    ScoreData,
    ScoreRequest,
    Texts,
)
from cluster.serving.openai.results import ResultCall, vectors
from cluster.serving.openai.served import Served
from cluster.serving.outcomes import probabilities
from cluster.serving.text.prompts import Prompt


def router(served: Served) -> APIRouter:
    routes, head = APIRouter(tags=["classes"], route_class=BodyRoute), served.service.info.head

    @routes.post("/classify")
    async def classify(body: ActivatedRequest, request: Request) -> ClassAnswer:
        call = ResultCall(served, request, "classify", body.model)
        computed = await call.compute(body, "label_logits")
        data = []
        for index, one in enumerate(computed):
            logits = one.numbers.array()
            probs = (probabilities(logits, head.activation) if body.activated else logits).tolist()
            label = head.labels[int(logits.argmax())]
            data.append(ClassData(index=index, label=label, probs=probs, num_classes=len(probs)))
        return ClassAnswer(data=data, **call.answered(computed))

    @routes.post("/v1/score", include_in_schema=False)
    @routes.post("/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreAnswer:
        call, pairs = ResultCall(served, request, "score", body.model), _pairs(*body.sides())
        scores, computed = await _scored(call, head, pairs)
        data = [ScoreData(index=index, score=one) for index, one in enumerate(scores)]
        return ScoreAnswer(data=data, **call.answered(computed))

    @routes.post("/v2/rerank", include_in_schema=False)
    @routes.post("/v1/rerank", include_in_schema=False)
    @routes.post("/rerank")
    async def rerank(body: RerankRequest, request: Request) -> RerankAnswer:
        """The documents by their scores with the query, as `/score` makes them, best first."""
        call = ResultCall(served, request, "rerank", body.model)
        pairs = _pairs(("query", body.query), ("documents", body.documents))
        scores, computed = await _scored(call, head, pairs)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
        shown = body.return_documents is not False
        results = [
            RerankResult(
                index=index, relevance_score=scores[index],
                document=RerankDocument(text=body.documents[index]) if shown else None,
            )
            for index in order
        ]  # fmt: skip
        answered = call.answered(computed)
        return RerankAnswer(id=answered["id"], model=answered["model"], usage=answered["usage"], results=results)

    return routes


async def _scored(
    call: ResultCall, head: Head, pairs: Sequence[tuple[str, str]]
) -> tuple[list[float], Sequence[Computed]]:
    """A head with one label scores both texts, one behind the other; any other model compares their embeddings."""
    if head.kind == "sequence_classification" and len(head.labels) == 1:
        computed = await call.compute_each(
            [Prompt(text=first + second, adapter=call.adapter) for first, second in pairs], "label_logits"
        )
        return [float(1 / (1 + np.exp(-one.numbers.array().astype(np.float64)[0]))) for one in computed], computed
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    computed = await call.compute_each([Prompt(text=text, adapter=call.adapter) for text in texts], "last_hidden_state")
    of_text = dict(zip(texts, vectors(computed, True), strict=True))
    return [float(of_text[first] @ of_text[second]) for first, second in pairs], computed


def _pairs(*sides: tuple[str, Texts]) -> list[tuple[str, str]]:
    """sides: the two, each with its name. Raises InvalidRequest."""
    (name, first), (other, second) = ((name, [one] if isinstance(one, str) else one) for name, one in sides)
    for each, texts in ((name, first), (other, second)):
        if not 1 <= len(texts) <= MAX_PROMPTS:
            raise InvalidRequest(f"{each} has {len(texts)} texts, 1 to {MAX_PROMPTS} are allowed", each)
    if len(first) not in (1, len(second)):
        raise InvalidRequest(
            f"{name} has {len(first)} texts and {other} {len(second)}: one, or as many as {other}, are needed", name
        )
    return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
