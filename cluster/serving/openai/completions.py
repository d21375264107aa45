"""`/v1/completions`: prompts of text or token ids, each continued, whole or as a stream."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest
from cluster.serving.openai.base_schema import UsageBody
from cluster.serving.openai.completion_schema import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Prompts,
)
from cluster.serving.openai.generation import Call, Choice, collect, generate, total, variants
from cluster.serving.openai.logprobs import completion_logprobs
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import DONE, begun, event
from cluster.serving.text.prompts import Prompt
from cluster.types import TextDelta

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this call
MAX_SEQUENCES = 2048  # of one call: prompts times choices


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", response_model=CompletionAnswer)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        served.check_model(body.model)
        body.check()
        _check(body)
        call = Call(request_id=f"cmpl-{served.service.new_request_id()}", client=request.state.client)
        completion = await _prepared(served, body, call)
        if body.stream:
            return await begun(completion.stream(), call.request_id)
        answer = await completion.answer()
        return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")

    return routes


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise InvalidRequest("suffix: this model writes behind a prompt, not into one", "suffix")
    if body.echo:
        raise InvalidRequest("echo: this server does not repeat the prompt", "echo")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(f"best_of is {body.best_of}, this server takes n ({body.n or 1})", "best_of")


async def _prepared(served: Served, body: CompletionRequest, call: Call) -> "_Completion":
    prompts, num_each = _prompts(body.prompt), body.n or 1
    if not 1 <= len(prompts) * num_each <= MAX_SEQUENCES:
        raise InvalidRequest(
            f"prompt has {len(prompts)} prompts with {num_each} choices each, 1 to {MAX_SEQUENCES} are allowed",
            "prompt",
        )
    params = body.sampling_params(
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens, logprobs=body.logprobs
    )
    if num_each > 1 or body.return_token_ids:  # tokenized once
        prompts = [await _tokenized(served, prompt, call) for prompt in prompts]
    asked = [(prompt, each) for prompt in prompts for each in variants(params, num_each)]
    return _Completion(
        served=served, body=body, call=call, created=int(served.now_s()), prompts=prompts, num_each=num_each,
        deltas=generate(served.service, asked, call),
    )  # fmt: skip


async def _tokenized(served: Served, prompt: Prompt, call: Call) -> Prompt:
    if prompt.token_ids is not None:
        return prompt
    return Prompt(token_ids=await served.service.tokenize(prompt, call.client))


def _prompts(given: Prompts) -> list[Prompt]:
    """One prompt, or several. Numbers side by side are one. Raises InvalidRequest."""
    if isinstance(given, str):
        return [Prompt(text=given)]
    if given and isinstance(given[0], int):
        return [Prompt(token_ids=[one for one in given if isinstance(one, int)])]
    return [Prompt(text=one) if isinstance(one, str) else Prompt(token_ids=one) for one in given
            if not isinstance(one, int)]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    """One call that is about to begin. num_each: choices of each prompt."""

    served: Served
    body: CompletionRequest
    call: Call
    created: int
    prompts: Sequence[Prompt]
    num_each: int
    deltas: AsyncGenerator[tuple[int, TextDelta], None]

    @property
    def _num_choices(self) -> int:
        return len(self.prompts) * self.num_each

    async def answer(self) -> CompletionAnswer:
        """Raises ClusterError."""
        choices = await collect(self.deltas, self._num_choices)
        shown = [self._choice(index, choice, choice.finish_reason, 0) for index, choice in enumerate(choices)]
        return self._body(shown, usage=UsageBody.of(total(choices, self.num_each)))

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yields events: of each choice its pieces, the last with the reason of its end; then the usage, if asked
        for."""
        choices = [Choice() for _ in range(self._num_choices)]
        usage: dict[str, Any] = {"usage": None} if self.body.includes_usage else {}
        async with aclosing(self.deltas):
            async for index, delta in self.deltas:
                piece, offset = Choice(), len(choices[index].text)
                begins = not choices[index].token_ids
                piece.add(delta)
                choices[index].add(delta)
                shown = self._choice(index, piece, delta.finish_reason, offset, begins=begins)
                yield event(self._body([shown], **usage))
        if self.body.includes_usage:
            yield event(self._body([], usage=UsageBody.of(total(choices, self.num_each))))
        yield DONE

    def _choice(
        self, index: int, piece: Choice, reason: str | None, offset: int, *, begins: bool = True
    ) -> CompletionChoice:
        ids: dict[str, Any] = {}
        if self.body.return_token_ids:
            ids["token_ids"] = piece.token_ids
            if begins:
                ids["prompt_token_ids"] = list(self.prompts[index // self.num_each].token_ids or ())
        return CompletionChoice(
            index=index, text=piece.text, logprobs=self._logprobs(piece, offset), finish_reason=reason, **ids
        )

    def _logprobs(self, piece: Choice, offset: int) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(piece.logprobs, piece.token_ids, self.served.service.token_bytes, offset)

    def _body(self, choices: list[CompletionChoice], **fields: Any) -> CompletionAnswer:
        return CompletionAnswer(
            id=self.call.request_id,
            object="text_completion",
            created=self.created,
            model=self.served.service.info.model_id,
            choices=choices,
            **fields,
        )
