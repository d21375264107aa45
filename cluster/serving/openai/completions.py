"""`/v1/completions`: prompts of text or token ids, each continued, whole or as a stream."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.errors import InvalidRequest
from cluster.inputs import CONTINUED
from cluster.serving.choices import (
    Call,
    Choice,
    behind,
    best,
    collect,
    generate,
    nothing,
    total,
    variants,
    with_stop_strings,
)
from cluster.serving.openai.answer_size import worded
from cluster.serving.openai.base_schema import UsageBody
from cluster.serving.openai.body_route import BodyRoute
from cluster.serving.openai.completion_schema import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from cluster.serving.openai.errors import OpenAIError
from cluster.serving.openai.forms import naming
from cluster.serving.openai.logprobs import as_token_ids, completion_logprobs, token_text
from cluster.serving.openai.prompt_logprobs import prompt_logprobs, score
from cluster.serving.openai.prompts import to_prompts
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import DONE, begun, event, streamed
from cluster.serving.prompt_tokens import PromptTokens
from cluster.serving.text.prompts import Prompt
from cluster.types import Logprobs, TextDelta, Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this call
MAX_SEQUENCES = 2048  # of one call: prompts times choices


def router(served: Served) -> APIRouter:
    routes = APIRouter(tags=["completions"], route_class=BodyRoute)

    chunks = streamed(CompletionAnswer, OpenAIError, done=True)

    @routes.post("/v1/completions", response_model=CompletionAnswer, responses=chunks)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        adapter = served.adapter_of(body.model)
        body.check()
        _check(body)
        call = Call(
            request_id=f"cmpl-{body.request_id or request.state.request_id}",
            client=request.state.client,
            adapter=adapter,
        )
        with naming(body.form_field):
            completion = await _prepared(served, body, call)
            if body.stream:
                return await begun(completion.stream(), call.request_id)
            choices = await completion.choices()
        if completion.scored:
            return await worded(lambda: completion.answer(choices), only_set=True)
        return Response(completion.answer(choices).model_dump_json(exclude_unset=True), media_type="application/json")

    return routes


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise InvalidRequest("suffix: this model writes behind a prompt, not into one", "suffix")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens is 0, which only a call with echo has an answer for", "max_tokens")
    if body.max_tokens == 0 and body.continue_from:
        raise InvalidRequest(f"{CONTINUED} has tokens of an answer, and max_tokens is 0", CONTINUED)
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise InvalidRequest(f"best_of is {body.best_of}, at least n ({body.n or 1}) is needed", "best_of")
    if body.best_of is not None and body.best_of > (body.n or 1) and body.stream:
        raise InvalidRequest(
            "best_of chooses among whole answers, and a stream shows them all: leave it out", "best_of"
        )


async def _prepared(served: Served, body: CompletionRequest, call: Call) -> "_Completion":
    prompts, num_each = to_prompts(body.prompt, "prompt", call.adapter), body.best_of or body.n or 1
    if len(prompts) * num_each > MAX_SEQUENCES:
        raise InvalidRequest(
            f"prompt has {len(prompts)} prompts with {num_each} choices each: "
            f"at most {MAX_SEQUENCES} answers are allowed",
            "prompt",
        )
    ranked = num_each > (body.n or 1)
    params = body.sampling_params(
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens or 1,
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
    )
    numbers = body.logprobs if body.echo else None
    if num_each > 1 or body.echo or body.needs_token_ids:  # tokenized once
        prompts = [await _tokenized(served, prompt, body, call) for prompt in prompts]
    tops = [num for num in (numbers, body.prompt_logprobs) if num is not None]
    param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
    asked = [(prompt, each) for prompt in prompts for each in variants(params, num_each)]
    continued = body.continued(len(asked))
    # Of a prompt whose answers all go on, nothing is shown again.
    new = [place for place in range(len(prompts)) if not all(continued[place * num_each : (place + 1) * num_each])]
    found: Sequence[PromptTokens] = ()
    if tops and new:
        found = await score(served.service, [prompts[place] for place in new], call, max(tops), param=param)
    asked = behind(asked, continued)
    deltas = nothing(len(asked)) if body.max_tokens == 0 else generate(served.service, asked, call)
    return _Completion(
        served=served, body=body, call=call, created=int(served.now_s()), prompts=prompts, num_each=num_each,
        deltas=with_stop_strings(deltas) if body.include_stop_str_in_output else deltas, continued=continued,
        scored=dict(zip(new, found, strict=False)), echoes=await _echoes(served, body, prompts, call),
    )  # fmt: skip


async def _echoes(served: Served, body: CompletionRequest, prompts: Sequence[Prompt], call: Call) -> Sequence[str]:
    """The prompts' texts, where they are asked for."""
    if not body.echo:
        return ()
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(given[0], str) and body.truncate_prompt_tokens is None:
        return [text for text in given if isinstance(text, str)]
    ids = [list(prompt.token_ids or ()) for prompt in prompts]
    return [await served.service.detokenize(one, skip_special_tokens=False, client=call.client) for one in ids]


async def _tokenized(served: Served, prompt: Prompt, body: CompletionRequest, call: Call) -> Prompt:
    if prompt.token_ids is not None:
        return Prompt(token_ids=body.truncated(list(prompt.token_ids)), adapter=prompt.adapter)
    token_ids = await served.service.tokenize(prompt, call.client)
    return Prompt(token_ids=body.truncated(token_ids), adapter=prompt.adapter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    """One call that is about to begin. num_each: choices of each prompt.  echoes: of each prompt, or none.
    scored: by the prompt's place, where an answer shows them.
    continued: of each choice, the tokens that its client has.
    """

    served: Served
    body: CompletionRequest
    call: Call
    created: int
    prompts: Sequence[Prompt]
    num_each: int
    deltas: AsyncGenerator[tuple[int, TextDelta], None]
    scored: Mapping[int, PromptTokens]
    echoes: Sequence[str]
    continued: Sequence[tuple[int, ...]]

    async def choices(self) -> list[Choice]:
        """All choices of each prompt, prompt by prompt. Raises ClusterError."""
        return await collect(self.deltas, len(self.prompts) * self.num_each)

    def answer(self, every: Sequence[Choice]) -> CompletionAnswer:
        """every: from `choices`."""
        usage, num_kept, shown = self._usage(every), self.body.n or 1, list[CompletionChoice]()
        for index in range(len(self.prompts)):
            choices = every[index * self.num_each : (index + 1) * self.num_each]
            kept = best(choices, num_kept) if self.num_each > num_kept else choices
            shown += [self._whole(index * num_kept + place, index, choice) for place, choice in enumerate(kept)]
        return self._body(shown, usage=UsageBody.of(usage))

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yields events: of each choice its pieces, the last with the reason of its end; then the usage, if asked
        for."""
        choices = [Choice(token_ids=list(tokens)) for tokens in self.continued]
        offsets: dict[int, int] = {}  # not of the text: some of it may be held back, while a stop string may come
        usage: dict[str, Any] = {"usage": None} if self.body.includes_usage else {}
        async with aclosing(self.deltas):
            async for index, delta in self.deltas:
                prompt, piece = index // self.num_each, Choice()
                piece.add(delta)
                begins = not choices[index].token_ids
                if index not in offsets:
                    offsets[index] = 0 if begins else self._num_chars(prompt, choices[index], begins=True)
                choices[index].add(delta)
                shown = self._choice(index, prompt, piece, begins=begins, offset=offsets[index])
                offsets[index] += self._num_chars(prompt, piece, begins=begins)
                yield event(self._body([shown], **usage))
        if self.body.includes_usage:
            yield event(self._body([], usage=UsageBody.of(self._usage(choices))))
        yield DONE

    def _usage(self, choices: Sequence[Choice]) -> Usage:
        if self.body.max_tokens == 0:  # no engine counted the prompt
            return Usage(prompt_tokens=sum(len(list(p.token_ids or ())) for p in self.prompts), completion_tokens=0)
        return total(choices, self.num_each)

    def _num_chars(self, prompt: int, piece: Choice, *, begins: bool) -> int:
        """Of a piece's tokens, with those of the echo before the first one, as `text_offset` counts them: it comes with
        log-probabilities alone."""
        if self.body.logprobs is None:
            return 0
        echoed = self.prompts[prompt].token_ids or () if begins and self.echoes else ()
        return sum(len(token_text(each, self.served.service.token_bytes)) for each in (*echoed, *piece.token_ids))

    def _whole(self, place: int, prompt: int, choice: Choice) -> CompletionChoice:
        shown = self._choice(place, prompt, choice, begins=True, offset=0)
        if self.body.prompt_logprobs is not None:
            text_of = self.served.service.token_bytes
            shown.prompt_logprobs = prompt_logprobs(self.scored[prompt].top(self.body.prompt_logprobs), text_of)
        return shown

    def _choice(self, place: int, prompt: int, piece: Choice, *, begins: bool, offset: int) -> CompletionChoice:
        """A choice, or a piece of one. begins: the first piece, which the echo stands before."""
        ids: dict[str, Any] = {"stop_reason": piece.matched_stop} if piece.matched_stop else {}
        if self.body.return_token_ids:
            ids["token_ids"] = piece.token_ids
            if begins:
                ids["prompt_token_ids"] = list(self.prompts[prompt].token_ids or ())
        echo = self.echoes[prompt] if begins and self.echoes else ""
        logprobs = None if self.body.logprobs is None else self._logprobs(prompt, piece, bool(echo), offset)
        return CompletionChoice(
            index=place, text=echo + piece.text, logprobs=logprobs, finish_reason=piece.finish_reason, **ids
        )

    def _logprobs(self, prompt: int, piece: Choice, echo: bool, offset: int) -> CompletionLogprobs:
        entries: list[Logprobs | None] = [*piece.logprobs]
        token_ids = piece.token_ids
        if echo:
            scored = self.scored[prompt].top(self.body.logprobs or 0)
            entries, token_ids = [None, *scored.entries, *entries], [*scored.token_ids, *token_ids]
        name_of = as_token_ids if self.body.return_tokens_as_token_ids else None
        return completion_logprobs(entries, token_ids, self.served.service.token_bytes, offset, name_of)

    def _body(self, choices: list[CompletionChoice], **fields: Any) -> CompletionAnswer:
        return CompletionAnswer(
            id=self.call.request_id,
            object="text_completion",
            created=self.created,
            model=self.served.shown_model(self.body.model),
            choices=choices,
            **fields,
        )
