"""The gRPC handlers of `vllm.grpc.engine.VllmEngine` for Ray Serve's ingress: the cluster as one engine.

As `moecluster.v1`'s (`cluster.serving.grpc.handlers`, which says how errors go out): they decide nothing.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.errors import RequestCancelled
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as pb
from cluster.serving.choices import Call, Choice, generate, variants
from cluster.serving.grpc.answer_size import check_numbers, receive_limit
from cluster.serving.grpc.calls import GrpcCalls
from cluster.serving.grpc.context import GrpcContext, fail_stream, metadata_of, set_status
from cluster.serving.grpc.vllm import messages
from cluster.serving.prompt_tokens import PromptTokens
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt
from cluster.types import SamplingParams

# Of a message, for each token of the prompt, with an id of three bytes: its number and place; of each likeliest token.
PROMPT_TOKEN_BYTES = 3 + 7 + 8
PROMPT_TOP_BYTES = 4 + 3


class VllmGenerate(GrpcCalls):
    """The rpc that answers prompts. Not thread-safe."""

    async def VllmGenerate(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        request_id = self._service.new_request_id()
        try:
            with self._counted(grpc_context, pb.GenerateRequest) as client:
                message = await self._beside(request, lambda: self._parse(request, pb.GenerateRequest), client)
                request_id = message.request_id or request_id
                asked = await self._beside(request, lambda: _question(message), client)
                call = Call(request_id=request_id, client=client, one_name=True)
                answers = _Answers(asked, stream=message.stream, receive_bytes=receive_limit(metadata_of(grpc_context)))
                async with aclosing(answers.run(self._service, call)) as responses:
                    async for response in responses:
                        yield response
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            if self._raise_failures:
                fail_stream(grpc_context, error, request_id)
            set_status(grpc_context, error, request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """params: of each answer.  num_top: as of `messages.num_prompt_top`."""

    prompt: Prompt
    params: list[SamplingParams]
    num_top: int | None


def _question(message: pb.GenerateRequest) -> _Question:
    """Raises InvalidRequest."""
    num = messages.num_choices(message.sampling_params)
    return _Question(
        prompt=messages.to_prompt(message),
        params=variants(messages.to_params(message.sampling_params), num),
        num_top=messages.num_prompt_top(message.sampling_params),
    )


class _Answers:
    """The answers to one request. receive_bytes: of a message that the caller takes."""

    def __init__(self, question: _Question, *, stream: bool, receive_bytes: int) -> None:
        self._question = question
        self._stream = stream
        self._receive_bytes = receive_bytes
        token_ids = question.prompt.token_ids
        num_known = len(token_ids) if isinstance(token_ids, tuple) else 0  # of an answer that is aborted before a token
        self._choices = [Choice(prompt_tokens=num_known) for _ in question.params]
        self._input_logprobs: pb.InputLogProbs | None = None

    async def run(self, service: InferenceService, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Raises ClusterError. An answer that is aborted ends with a complete that says so."""
        try:
            prompt = await self._scored(service, call)
            asked = [(prompt, params) for params in self._question.params]
            async with aclosing(generate(service, asked, call)) as deltas:
                async for index, delta in deltas:
                    choice = self._choices[index]
                    begins = not choice.token_ids
                    choice.add(delta)
                    if self._stream and delta.token_ids:
                        of_prompt = self._input_logprobs if begins else None
                        yield messages.to_chunk(delta, choice, index, of_prompt)
                    if delta.finish_reason is not None:
                        yield self._complete(index)
        except RequestCancelled:
            for index, choice in enumerate(self._choices):
                if choice.finish_reason is None:
                    yield self._complete(index, aborted=True)

    async def _scored(self, service: InferenceService, call: Call) -> Prompt:
        """Computes the prompt's log-probabilities, if they are wanted; returns the prompt, tokenized then.

        Raises ClusterError; InvalidRequest where they would be more than the caller takes.
        """
        question = self._question
        if question.num_top is None:
            return question.prompt
        bytes_each = PROMPT_TOKEN_BYTES + PROMPT_TOP_BYTES * question.num_top
        computed = await service.compute(
            question.prompt, "token_logprobs", request_id=call.request_id, client=call.client,
            check=lambda num_tokens: check_numbers(num_tokens, bytes_each, self._receive_bytes),
            num_top=max(1, question.num_top),
        )  # fmt: skip
        self._input_logprobs = await asyncio.to_thread(
            lambda: messages.to_input_logprobs(PromptTokens.of(computed, question.num_top or 0))
        )
        return replace(question.prompt, text=None, token_ids=computed.prompt_token_ids)

    def _complete(self, index: int, *, aborted: bool = False) -> pb.GenerateResponse:
        return messages.to_complete(
            self._choices[index],
            self._question.params[index],
            index,
            logprobs=not self._stream,
            input_logprobs=None if self._stream else self._input_logprobs,
            aborted=aborted,
        )
