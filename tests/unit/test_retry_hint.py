"""A refused stream's retry hint on its way through Ray Serve's own proxy: typed, and harmless to an older version's."""

import asyncio
import io
import pickle

import grpc
import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.serve._private.grpc_util import get_grpc_response_status, gRPCGenericServer, set_grpc_code_and_details
from ray.serve.exceptions import gRPCStatusError
from ray.serve.grpc_util import RayServegRPCContext
from serving_fakes import EchoBackend, make_service, write_tokenizer

from cluster.errors import Overloaded
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.runtime.front.serve_proxy import add_inference_service
from cluster.serving.grpc.context import StreamFailed, fail_stream
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.text.tokenizer import Tokenizer

HINT = "grpc-retry-pushback-ms"


def raised_in_the_proxy(error, context, loads=pickle.loads):
    """The exception as it comes from a replica: Serve wraps it, Ray pickles it as a task's error."""
    wrapped = gRPCStatusError(error, context.code(), context.details())
    return loads(cloudpickle.dumps(RayTaskError("stream", "a traceback", wrapped))).as_instanceof_cause()


class Refusing(EchoBackend):
    """An engine that is full, for so long as its message says and for longer."""

    async def generate(self, request):
        raise Overloaded("the queue is full: try again in 99.0 s", 41.25)
        yield


@pytest.fixture
def refusal(tmp_path):
    """Returns the code, details and metadata of a refused stream, through a server that calls as Serve's proxy does."""
    ingress = GrpcInferenceService(make_service(Tokenizer(write_tokenizer(tmp_path)), Refusing()))

    def factory(service_method, streaming_type):
        method = getattr(ingress, service_method.split("/")[-1], None)

        async def stream(request, context):
            at_the_replica = pickle.loads(pickle.dumps(RayServegRPCContext(context)))
            try:
                async for response in method(request, at_the_replica):
                    at_the_replica._set_on_grpc_context(context)
                    yield response.SerializeToString()
            except StreamFailed as error:
                status = get_grpc_response_status(raised_in_the_proxy(error, at_the_replica), None, "r")
                set_grpc_code_and_details(context, status)

        return stream

    async def run():
        server = gRPCGenericServer(factory)
        add_inference_service(ingress, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateStreamRequest(text="ab"))
            answer = await call.code(), await call.details(), dict(await call.trailing_metadata())
        await server.stop(None)
        return answer

    return asyncio.run(run())


def test_the_hint_is_the_errors_number_and_not_its_words(refusal):
    code, details, trailing = refusal
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "the queue is full: try again in 99.0 s"
    assert trailing[HINT] == "41250"


class Context:
    """As RayServegRPCContext keeps them."""

    def __init__(self):
        self._code, self._details = None, ""

    def set_code(self, code):
        self._code = code

    def set_details(self, details):
        self._details = details

    def set_trailing_metadata(self, metadata):
        pass

    def code(self):
        return self._code

    def details(self):
        return self._details


class OlderStreamFailed(Exception):
    """As the version before had it, under the same name."""


class OlderProcess(pickle.Unpickler):
    """Knows of this package the exception alone."""

    def find_class(self, module, name):
        if module.split(".")[0] != "cluster":
            return super().find_class(module, name)
        assert name == "StreamFailed"
        return OlderStreamFailed


def test_a_proxy_of_an_older_version_gets_plain_details():
    context = Context()
    with pytest.raises(StreamFailed) as failed:
        fail_stream(context, Overloaded.later("the queue is full", 41.04), "r")

    def loads(data):
        return OlderProcess(io.BytesIO(data)).load()

    status = get_grpc_response_status(raised_in_the_proxy(failed.value, context, loads), None, "r")
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(status.message) is str
    assert status.message == "the queue is full: try again in 41.0 s"


def test_a_stream_that_an_older_replica_ended_has_its_details_and_no_hint():
    failed = pickle.loads(pickle.dumps(StreamFailed("the queue is full: try again in 41.0 s")))
    assert (str(failed), failed.retry_after_s) == ("the queue is full: try again in 41.0 s", None)
