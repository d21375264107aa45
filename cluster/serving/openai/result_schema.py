"""The bodies of calls whose answers are numbers. Sources: OpenAI's API reference (embeddings), vLLM's (the others)."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from cluster.errors import InvalidRequest
from cluster.serving.openai.base_schema import AnswerBody, RequestBody
from cluster.serving.openai.prompts import Prompts

Encoding = Literal["float", "base64"]
Task = Literal["embed", "token_embed", "classify", "token_classify"]


class InputRequest(RequestBody):
    model: str | None = None
    input: Prompts
    user: str | None = None  # without effect


class ActivatedRequest(InputRequest):
    """use_activation: false for the numbers as the model gives them, in place of vectors of length one, or of
    probabilities.  normalize: vLLM's older word for the same."""

    normalize: bool | None = None
    use_activation: bool | None = None

    @property
    def activated(self) -> bool:
        return self.normalize is not False and self.use_activation is not False


class EmbeddingRequest(ActivatedRequest):
    """pooling: ours; the last token's hidden state, or all tokens' mean."""

    encoding_format: Encoding | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None


class PoolingRequest(ActivatedRequest):
    """task: by default the head's: classify, token_classify, else embed."""

    encoding_format: Encoding | None = None
    task: Task | None = None


Texts = str | list[str]


class ScoreRequest(RequestBody):
    """One text against each of several, or two lists of one length: under one of three pairs of names, all vLLM's."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"queries": "What is the capital of France?", "documents": ["Paris", "Rome"]}]}
    )
    model: str | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    user: str | None = None  # without effect

    def sides(self) -> tuple[tuple[str, Texts], tuple[str, Texts]]:
        """Returns each side's name and texts. Raises InvalidRequest."""
        pairs = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
        given = [names for names in pairs if any(getattr(self, name) is not None for name in names)] or [pairs[0]]
        missing = [name for names in given for name in names if getattr(self, name) is None]
        if len(given) > 1 or missing:
            wanted = "text_1 and text_2, or queries and documents, or data_1 and data_2 are needed"
            raise InvalidRequest(wanted, missing[0] if len(given) == 1 else given[1][0])
        first, second = given[0]
        return (first, getattr(self, first)), (second, getattr(self, second))


class RerankRequest(RequestBody):
    """top_n: of the documents, 0 for all.  return_documents: without them a result has an index alone."""

    model: str | None = None
    query: str
    documents: list[str]
    top_n: Annotated[int, Field(ge=0)] = 0
    return_documents: bool | None = None
    user: str | None = None  # without effect


class PromptUsage(AnswerBody):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class EmbeddingData(AnswerBody):
    """embedding: numbers, or in base64 their float32 bytes, little-endian."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class PoolingData(AnswerBody):
    """data: [H] or [L], of each token [T, H] or [T, L]; in base64 as above, row by row."""

    object: str = "pooling"
    index: int
    data: list[float] | list[list[float]] | str


class ClassData(AnswerBody):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ScoreData(AnswerBody):
    object: str = "score"
    index: int
    score: float


class RerankDocument(AnswerBody):
    text: str


class RerankResult(AnswerBody):
    index: int
    document: RerankDocument | None
    relevance_score: float


class RerankAnswer(AnswerBody):
    """results: the best first."""

    id: str
    model: str
    usage: PromptUsage
    results: list[RerankResult]


class ResultAnswer(AnswerBody):
    id: str
    object: str = "list"
    created: int
    model: str
    usage: PromptUsage


class EmbeddingAnswer(ResultAnswer):
    data: list[EmbeddingData]


class PoolingAnswer(ResultAnswer):
    data: list[PoolingData]


class ClassAnswer(ResultAnswer):
    data: list[ClassData]


class ScoreAnswer(ResultAnswer):
    data: list[ScoreData]
