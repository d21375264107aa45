"""The bodies of calls whose answers are numbers. Sources: OpenAI's API reference (embeddings), vLLM's (the others)."""

from typing import Literal

from cluster.serving.openai.base_schema import AnswerBody, RequestBody
from cluster.serving.openai.prompts import Prompts

Encoding = Literal["float", "base64"]
Task = Literal["embed", "token_embed", "classify", "token_classify"]


class InputRequest(RequestBody):
    model: str | None = None
    input: Prompts
    user: str | None = None  # without effect


class EmbeddingRequest(InputRequest):
    """pooling: ours; the last token's hidden state, or all tokens' mean.  normalize: to a length of one."""

    encoding_format: Encoding | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None


class PoolingRequest(InputRequest):
    """task: by default the head's: classify, token_classify, else embed."""

    encoding_format: Encoding | None = None
    task: Task | None = None
    normalize: bool | None = None


class ScoreRequest(RequestBody):
    """One text against each of several, or two lists of one length."""

    model: str | None = None
    text_1: str | list[str]
    text_2: str | list[str]
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
