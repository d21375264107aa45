"""`/v1/chat/completions`: a conversation's next message, whole or as a stream of deltas."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest
from cluster.serving.choices import Call, Choice, behind, collect, generate, total, variants, with_stop_strings
from cluster.serving.openai.answer_size import worded
from cluster.serving.openai.base_schema import UsageBody
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.chat_schema import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
)
from cluster.serving.openai.conversations import to_conversation
from cluster.serving.openai.errors import OpenAIError
from cluster.serving.openai.forms import naming
from cluster.serving.openai.logprobs import as_token_ids, chat_logprobs
from cluster.serving.openai.message_reader import MessageReader, joined, reader_for
from cluster.serving.openai.prompt_logprobs import prompt_logprobs, score
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import DONE, begun, event, streamed
from cluster.serving.openai.tool_reader import chosen_form, form_field
from cluster.serving.text.prompts import Prompt
from cluster.types import Logprobs, SamplingParams, TextDelta

NOTHING = TextDelta()


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["chat"], route_class=BodyRoute)

    @routes.post(
        "/v1/chat/completions", response_model=ChatAnswer, responses=streamed(ChatChunk, OpenAIError, done=True)
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        served.adapter_of(body.model)
        body.check()
        call = Call(request_id=f"chatcmpl-{body.request_id or request.state.request_id}", client=request.state.client)
        with naming(form_field(body)), naming(body.length_field, "max_tokens"):
            chat = await prepared(served, body, call)
            if body.stream:
                return await begun(chat.stream(), call.request_id)
            answer = await chat.answer()
        if body.prompt_logprobs is not None:
            return await worded(lambda: answer, only_set=True)
        return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")

    return routes


async def prepared(served: Served, body: ChatRequest, call: Call) -> "PreparedChat":
    """Checks a body. Raises ClusterError; nothing runs yet."""
    params, adapter = _params(body), served.adapter_of(body.model)
    prompt = Prompt(chat=to_conversation(body), adapter=adapter)
    num_choices = body.n or 1
    prompt_token_ids = None
    if num_choices > 1 or body.needs_token_ids:  # rendered and tokenized once
        prompt_token_ids = body.truncated(await served.service.tokenize(prompt, call.client))
        prompt = Prompt(token_ids=prompt_token_ids, adapter=adapter)
    continued = body.continued(num_choices)
    asked = behind([(prompt, each) for each in variants(params, num_choices)], continued)
    deltas = generate(served.service, asked, call)
    if body.include_stop_str_in_output:
        deltas = with_stop_strings(deltas)
    return PreparedChat(
        served=served, body=body, call=call, created=int(served.now_s()), prompt=prompt,
        continued=continued, params=params, deltas=deltas,
        prompt_token_ids=prompt_token_ids if body.return_token_ids else None,
    )  # fmt: skip


def _params(body: ChatRequest) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return body.sampling_params(max_tokens=max_tokens, logprobs=logprobs, form=chosen_form(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedChat:
    """One call that is about to begin. continued: of each choice, the tokens that its client has."""

    served: Served
    body: ChatRequest
    call: Call
    created: int
    prompt: Prompt
    continued: Sequence[tuple[int, ...]]
    params: SamplingParams
    deltas: AsyncGenerator[tuple[int, TextDelta], None]
    prompt_token_ids: list[int] | None

    @property
    def num_choices(self) -> int:
        return len(self.continued)

    async def check(self) -> None:
        """Finds what would end it before its first token. Raises InvalidRequest, Overloaded."""
        await self.served.service.prepare(self.prompt, self.params, client=self.call.client)

    async def answer(self) -> ChatAnswer:
        """Raises ClusterError."""
        service, shown = self.served.service, dict[str, Any]()
        if self.body.prompt_logprobs is not None:
            [scored] = await score(service, [self.prompt], self.call, self.body.prompt_logprobs)
            shown["prompt_logprobs"] = await asyncio.to_thread(prompt_logprobs, scored, service.token_bytes)
        choices = await collect(self.deltas, self.num_choices)
        if self.prompt_token_ids is not None:
            shown["prompt_token_ids"] = self.prompt_token_ids
        return ChatAnswer(
            id=self.call.request_id,
            object="chat.completion",
            created=self.created,
            model=self.served.shown_model(self.body.model),
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=UsageBody.of(total(choices, self.num_choices)),
            **shown,
        )

    def _choice(self, index: int, choice: Choice) -> ChatChoice:
        reader = reader_for(self.body)
        reader.read(choice.text)
        reader.end()
        return ChatChoice(
            index=index,
            message=reader.whole(),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=reader.finish_reason(choice.finish_reason or "error"),
            **self._vllms(choice.matched_stop, choice.token_ids),
        )

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yields events: of each choice its role, its deltas, the reason of its end; then the usage, if asked for."""
        choices = [Choice() for _ in range(self.num_choices)]
        readers = [reader_for(self.body) for _ in choices]
        shown: dict[str, Any] = {}
        if self.prompt_token_ids is not None:
            shown["prompt_token_ids"] = self.prompt_token_ids
        announced = False
        async with aclosing(self.deltas):
            async for index, delta in self.deltas:
                if not announced:  # not before: until then a failure has a status of its own
                    for each in (each for each, tokens in enumerate(self.continued) if not tokens):
                        yield self._event(each, AnswerMessage(role="assistant", content=""), NOTHING, **shown)
                    announced = True
                choices[index].add(delta)
                for text in self._events(index, delta, readers[index]):
                    yield text
        if self.body.includes_usage:
            yield event(self._chunk([], usage=UsageBody.of(total(choices, self.num_choices))))
        yield DONE

    def _events(self, index: int, delta: TextDelta, reader: MessageReader) -> Iterator[str]:
        """Of one delta. With its token ids it is one event: whoever has the tokens has all that they say."""
        if delta.text_before:
            reader.read(delta.text_before)  # its client has what that says
        parts, reason = reader.read(delta.text), None
        if delta.finish_reason is not None:
            parts += reader.end()
            reason = reader.finish_reason(delta.finish_reason)
        if self.body.return_token_ids:
            yield self._event(index, joined(parts), delta, reason)
            return
        if not parts and delta.token_ids and self.body.logprobs:
            parts = [AnswerMessage(content="")]
        for position, part in enumerate(parts):
            yield self._event(index, part, NOTHING if position else delta)
        if reason is not None:
            yield self._event(index, AnswerMessage(), TextDelta(matched_stop=delta.matched_stop), reason)

    def _event(
        self, index: int, message: AnswerMessage, delta: TextDelta, reason: str | None = None, **fields: Any
    ) -> str:
        choice = ChunkChoice(
            index=index,
            delta=message,
            logprobs=self._logprobs(delta.logprobs) if delta.logprobs else None,
            finish_reason=reason,
            **self._vllms(delta.matched_stop if reason else None, delta.token_ids or None),
        )
        return event(self._chunk([choice], **({"usage": None} if self.body.includes_usage else {}), **fields))

    def _vllms(self, matched_stop: str | None, token_ids: Sequence[int] | None) -> dict[str, Any]:
        """The fields of a choice that vLLM adds to OpenAI's; None for one that is left out."""
        stop = {"stop_reason": matched_stop} if matched_stop else {}
        return {
            **stop,
            **({"token_ids": list(token_ids)} if self.body.return_token_ids and token_ids is not None else {}),
        }

    def _chunk(self, choices: list[ChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(
            id=self.call.request_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.served.shown_model(self.body.model),
            choices=choices,
            **fields,
        )

    def _logprobs(self, entries: Sequence[Logprobs]) -> ChoiceLogprobs | None:
        name_of = as_token_ids if self.body.return_tokens_as_token_ids else self.served.service.token_bytes
        return chat_logprobs(entries, name_of) if self.body.logprobs else None
