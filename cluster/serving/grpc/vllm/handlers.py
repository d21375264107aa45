"""The gRPC handlers of `vllm.grpc.engine.VllmEngine` for Ray Serve's ingress: the cluster as one engine.

As `moecluster.v1`'s (`cluster.serving.grpc.handlers`, which says how errors go out): they decide nothing.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.errors import RequestCancelled
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as pb
from cluster.serving.choices import Call, Choice, generate, variants
from cluster.serving.grpc.calls import GrpcCalls
from cluster.serving.grpc.context import GrpcContext, fail_stream, set_status
from cluster.serving.grpc.vllm import messages
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt
from cluster.types import SamplingParams


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
                prompt, params, num = await self._beside(request, lambda: _question(message), client)
                call = Call(request_id=request_id, client=client, one_name=True)
                answers = _Answers(prompt, variants(params, num), stream=message.stream)
                async with aclosing(answers.run(self._service, call)) as responses:
                    async for response in responses:
                        yield response
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            if self._raise_failures:
                fail_stream(grpc_context, error, request_id)
            set_status(grpc_context, error, request_id)


def _question(message: pb.GenerateRequest) -> tuple[Prompt, SamplingParams, int]:
    """Raises InvalidRequest."""
    num = messages.num_choices(message.sampling_params)
    return messages.to_prompt(message), messages.to_params(message.sampling_params), num


class _Answers:
    """The answers to one request."""

    def __init__(self, prompt: Prompt, params: list[SamplingParams], *, stream: bool) -> None:
        self._asked = [(prompt, each) for each in params]
        self._stream = stream
        self._choices = [Choice() for _ in params]
        self._num_prompt_tokens = len(prompt.token_ids) if isinstance(prompt.token_ids, tuple) else 0

    async def run(self, service: InferenceService, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Raises ClusterError. An answer that is aborted ends with a complete that says so."""
        try:
            async with aclosing(generate(service, self._asked, call)) as deltas:
                async for index, delta in deltas:
                    choice = self._choices[index]
                    choice.add(delta)
                    if delta.usage is not None:
                        self._num_prompt_tokens = delta.usage.prompt_tokens
                    if self._stream and delta.token_ids:
                        yield messages.to_chunk(delta, choice, index, self._num_prompt_tokens)
                    if delta.finish_reason is not None:
                        yield self._complete(index)
        except RequestCancelled:
            for index, choice in enumerate(self._choices):
                if choice.finish_reason is None:
                    yield self._complete(index, aborted=True)

    def _complete(self, index: int, *, aborted: bool = False) -> pb.GenerateResponse:
        choice, params = self._choices[index], self._asked[index][1]
        return messages.to_complete(
            choice, params, index, self._num_prompt_tokens, logprobs=not self._stream, aborted=aborted
        )
