"""The gRPC handlers of `inference.GRPCInferenceService` for Ray Serve's ingress; they decide nothing.

As `moecluster.v1`'s (`cluster.serving.grpc.handlers`, which says how errors go out), but for ModelStreamInfer: there a
request that fails gets an error_message, and the other requests of its stream go on.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.errors import ClusterError, InvalidRequest, NotFound
from cluster.pb.inference import grpc_service_pb2 as pb
from cluster.serving.choices import Call, Choice, collect, generate, variants
from cluster.serving.grpc.calls import GrpcCalls, may_ask
from cluster.serving.grpc.context import GrpcContext, details_of
from cluster.serving.grpc.gateways import GatewayView
from cluster.serving.grpc.kserve.answers import FINAL, VERSION, to_response
from cluster.serving.grpc.kserve.question import INPUTS, OUTPUTS, Question, to_question
from cluster.serving.model_names import adapter_of
from cluster.types import TextDelta
from cluster.version import __version__

SERVER_NAME = "moe-cluster"
_OF_EACH = ("finish_reason", "text_output", "cumulative_logprob", "logprobs", "num_output_tokens")  # one an output


class KServeService(GrpcCalls):
    """A mixin of the ingress deployment: one method an rpc. Not thread-safe."""

    def open_kserve(self, view: GatewayView) -> None:
        """To be called before the first rpc."""
        self._kserve_health = view.health
        self._model_names = (self._service.info.model_id, *view.aliases)

    async def ServerLive(self, request: bytes, grpc_context: GrpcContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=may_ask(self._service.admission, grpc_context))

    async def ServerReady(self, request: bytes, grpc_context: GrpcContext) -> pb.ServerReadyResponse:
        ready = may_ask(self._service.admission, grpc_context) and self._kserve_health.serving
        return pb.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: bytes, grpc_context: GrpcContext) -> pb.ModelReadyResponse:
        if not may_ask(self._service.admission, grpc_context):
            return pb.ModelReadyResponse()
        try:
            message = self._parse(request, pb.ModelReadyRequest)
            self._adapter(message.name, message.version)
        except ClusterError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._kserve_health.serving)

    async def ServerMetadata(self, request: bytes, grpc_context: GrpcContext) -> pb.ServerMetadataResponse:
        async def answer(_: pb.ServerMetadataRequest, __: str) -> pb.ServerMetadataResponse:
            return pb.ServerMetadataResponse(name=SERVER_NAME, version=__version__)

        return await self._answer(request, grpc_context, pb.ServerMetadataRequest, pb.ServerMetadataResponse, answer)

    async def ModelMetadata(self, request: bytes, grpc_context: GrpcContext) -> pb.ModelMetadataResponse:
        async def answer(message: pb.ModelMetadataRequest, _: str) -> pb.ModelMetadataResponse:
            self._adapter(message.name, message.version)
            response = pb.ModelMetadataResponse(name=message.name, versions=[VERSION], platform=SERVER_NAME)
            for name, datatype in INPUTS.items():
                response.inputs.add(name=name, datatype=datatype, shape=[1])
            for name, datatype in OUTPUTS.items():
                response.outputs.add(name=name, datatype=datatype, shape=[-1 if name in _OF_EACH else 1])
            return response

        return await self._answer(request, grpc_context, pb.ModelMetadataRequest, pb.ModelMetadataResponse, answer)

    async def ModelInfer(self, request: bytes, grpc_context: GrpcContext) -> pb.ModelInferResponse:
        async def answer(message: pb.ModelInferRequest, client: str) -> pb.ModelInferResponse:
            question = await self._beside(request, lambda: self._question(message), client)
            if question.stream:
                raise InvalidRequest(
                    "stream is true: ModelStreamInfer answers in pieces, ModelInfer as a whole", "stream"
                )
            return await self._whole(message, question, client)

        return await self._answer(request, grpc_context, pb.ModelInferRequest, pb.ModelInferResponse, answer)

    async def ModelStreamInfer(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Answers one request of a stream (`exchange`)."""
        message = pb.ModelInferRequest()
        try:
            with self._counted(grpc_context, pb.ModelInferRequest) as client:
                message = await self._beside(request, lambda: self._parse(request, pb.ModelInferRequest), client)
                question = await self._beside(request, lambda: self._question(message), client)
                if question.stream:
                    async with aclosing(self._pieces(message, question, client)) as pieces:
                        async for piece in pieces:
                            yield pb.ModelStreamInferResponse(infer_response=piece)
                else:
                    whole = await self._whole(message, question, client)
                    whole.parameters[FINAL].bool_param = True
                    yield pb.ModelStreamInferResponse(infer_response=whole)
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a message
            yield pb.ModelStreamInferResponse(
                error_message=details_of(error, message.id),
                infer_response=pb.ModelInferResponse(
                    model_name=message.model_name, model_version=VERSION, id=message.id
                ),
            )

    def _adapter(self, name: str, version: str) -> str:
        """Raises NotFound for a model or a version that is not served."""
        if version not in ("", VERSION):
            raise NotFound(f"version {version[:40]!r} is not served here: there is {VERSION!r} alone", "model_version")
        return adapter_of(name, self._model_names, self._service.adapters())

    def _question(self, message: pb.ModelInferRequest) -> Question:
        return to_question(message, self._adapter(message.model_name, message.model_version))

    def _deltas(
        self, message: pb.ModelInferRequest, question: Question, client: str
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        name = message.id or self._service.new_request_id()
        call = Call(request_id=name, client=client, timeout_s=question.timeout_s)
        prompt = question.prompt
        return generate(self._service, [(prompt, each) for each in variants(question.params, question.num)], call)

    async def _whole(self, message: pb.ModelInferRequest, question: Question, client: str) -> pb.ModelInferResponse:
        choices = await collect(self._deltas(message, question, client), question.num)
        sums = [_sum(choice) for choice in choices]
        return to_response(message, question, choices, sums, self._service.token_bytes)

    async def _pieces(
        self, message: pb.ModelInferRequest, question: Question, client: str
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        sums, ended = [0.0] * question.num, 0
        async with aclosing(self._deltas(message, question, client)) as deltas:
            async for index, delta in deltas:
                pieces = [Choice() for _ in range(question.num)]
                pieces[index].add(delta)
                sums[index] += _sum(pieces[index])
                ended += delta.finish_reason is not None
                response = to_response(message, question, pieces, sums, self._service.token_bytes)
                response.parameters[FINAL].bool_param = ended == question.num
                yield response


def _sum(choice: Choice) -> float:
    return sum(entry.logprob for entry in choice.logprobs)
