"""`/tokenize` and `/detokenize`: vLLM's calls between texts or conversations and token ids; and `/tokenizer_info`, from
which lm-eval learns that it needs no tokenizer of its own."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict

from cluster.errors import InvalidRequest
from cluster.serving.openai.base_schema import AnswerBody, RequestBody
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.chat_schema import ChatRequest, MessageBody, ToolBody
from cluster.serving.openai.conversations import to_conversation
from cluster.serving.openai.served import Served
from cluster.serving.text.prompts import Prompt


class TokenizeRequest(RequestBody):
    """prompt, or messages with the fields of a chat that its template sees.
    add_special_tokens: without effect, the tokenizers of this family add none.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    tools: list[ToolBody] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def to_prompt(self) -> Prompt:
        """Raises InvalidRequest."""
        if self.messages is None and self.prompt is None:
            raise InvalidRequest("prompt and messages are both missing, one of them is needed", "prompt")
        if self.messages is None:
            return Prompt(text=self.prompt)
        if self.prompt is not None:
            raise InvalidRequest("prompt and messages are both there, one of them is needed", "prompt")
        chat = ChatRequest(
            messages=self.messages,
            tools=self.tools,
            documents=self.documents,
            chat_template_kwargs=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )
        return Prompt(chat=to_conversation(chat))


class TokenizeAnswer(AnswerBody):
    """token_strs: each token's text; bytes that are no text alone become U+FFFD."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(AnswerBody):
    """Also with the model's other special tokens, by their names. Source: vLLM"""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str = "Qwen2Tokenizer"
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
    model_max_length: int


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: list[int]


class DetokenizeAnswer(AnswerBody):
    prompt: str


def router(served: Served) -> APIRouter:
    routes, service = APIRouter(tags=["tokens"], route_class=BodyRoute), served.service

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
        served.adapter_of(body.model)
        ids = await service.tokenize(body.to_prompt(), request.state.client)
        texts = [service.token_bytes(each).decode(errors="replace") for each in ids] if body.return_token_strs else None
        return TokenizeAnswer(count=len(ids), max_model_len=service.info.max_model_len, tokens=ids, token_strs=texts)

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        described = {**service.tokenizer_info(), "model_max_length": service.info.max_model_len}
        return TokenizerInfo.model_validate(described)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
        served.adapter_of(body.model)
        text = await service.detokenize(body.tokens, skip_special_tokens=False, client=request.state.client)
        return DetokenizeAnswer(prompt=text)

    return routes
