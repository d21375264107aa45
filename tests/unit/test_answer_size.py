"""Answers that a client of gRPC's defaults could not take are refused with what to do; those that it can are not."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fakes import HELLO, EchoBackend, make_service, write_tokenizer
from test_grpc_server import FakeContext

from cluster.client.grpc_client import Client
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.runtime.front.haproxy import MAX_MESSAGE_BYTES
from cluster.serving.grpc.answer_size import (
    DEFAULT_RECEIVE_BYTES,
    MAX_ANSWER_BYTES,
    RECEIVE_KEY,
    check_before,
    receive_limit,
)
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams

CONTEXT = 40_000


class Backend(EchoBackend):
    """Remembers whether it was asked."""

    asked = 0

    def generate(self, request):
        self.asked += 1
        return super().generate(request)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def call(tokenizer, method, request, metadata=(), backend=None):
    """(code's name, details, response) of a unary call."""
    service = make_service(tokenizer, backend or Backend(), max_model_len=CONTEXT, max_request_bytes=1 << 20)
    context = FakeContext(metadata)

    async def answer():
        return await getattr(GrpcInferenceService(service), method)(request.SerializeToString(), grpc_context=context)

    response = asyncio.run(answer())
    return context.code.name if context.code else "OK", context.details, response


def asking(max_tokens, logprobs=None):
    params = pb.SamplingParams(max_tokens=max_tokens, logprobs=logprobs)
    return pb.GenerateRequest(text="hello", sampling_params=params)


def answer_of(num_tokens, logprobs, rng):
    """As large as one of A2.7B's can be: ids of three bytes, four letters a token."""
    ids = [rng.randrange(1 << 16, 151_936) for _ in range(num_tokens)]
    top = [pb.TopLogprob(token_id=token_id, logprob=-1.5) for token_id in ids[:1] * logprobs]
    each = [pb.TokenLogprobs(token_id=token_id, logprob=-1.5, top=top) for token_id in ids]
    return pb.GenerateResponse(text="abcd" * num_tokens, token_ids=ids, logprobs=each)


@pytest.mark.parametrize("logprobs", [0, 1, 5, 20])
def test_the_estimate_is_the_size_of_a_large_answer(logprobs):
    size = answer_of(1000, logprobs, random.Random(0)).ByteSize()
    check_before(SamplingParams(max_tokens=1000, logprobs=logprobs), round(size * 1.05) + 100)
    with pytest.raises(InvalidRequest):
        check_before(SamplingParams(max_tokens=1000, logprobs=logprobs), round(size * 0.9))


def test_16000_tokens_with_20_logprobs_are_refused_before_the_work(tokenizer):
    """They are 5.1 MB. It was RESOURCE_EXHAUSTED at the client, the code of a full queue, after all of it."""
    backend = Backend()
    code, details, _ = call(tokenizer, "Generate", asking(16_000, 20), backend=backend)
    assert code == "INVALID_ARGUMENT"
    assert "ask for a stream, for 12985 tokens" in details
    assert RECEIVE_KEY in details
    assert backend.asked == 0


@pytest.mark.parametrize("request_", [asking(12_985, 20), asking(16_000, 5), asking(39_000)])
def test_an_answer_that_the_client_can_take_is_generated(tokenizer, request_):
    backend = Backend()
    assert call(tokenizer, "Generate", request_, backend=backend)[0] == "OK"
    assert backend.asked == 1


def test_a_client_that_has_raised_its_limit_says_so(tokenizer):
    metadata = [(RECEIVE_KEY, str(8 << 20))]
    assert call(tokenizer, "Generate", asking(16_000, 20), metadata)[0] == "OK"


def test_a_default_max_tokens_counts_as_well(tokenizer):
    request = pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(logprobs=20))
    assert call(tokenizer, "Generate", request)[0] == "INVALID_ARGUMENT"


def test_a_detokenized_text_of_more_than_the_client_takes_is_refused(tokenizer):
    """Its length is known only when it is made."""
    request = pb.DetokenizeRequest(token_ids=[HELLO] * 200)
    _, _, response = call(tokenizer, "Detokenize", request)
    size = response.ByteSize()
    assert size
    code, details, response = call(tokenizer, "Detokenize", request, [(RECEIVE_KEY, str(size - 1))])
    assert (code, response) == ("INVALID_ARGUMENT", pb.DetokenizeResponse())
    assert f"the answer has {size} bytes" in details


@pytest.mark.parametrize("value", ["", "-1", "many", "1e9", "٣"])
def test_a_limit_that_is_no_number_is_named(tokenizer, value):
    code, details, _ = call(tokenizer, "GetModelInfo", pb.GetModelInfoRequest(), [(RECEIVE_KEY, value)])
    assert code == "INVALID_ARGUMENT"
    assert RECEIVE_KEY in details


def test_no_limit_is_above_the_servers():
    assert MAX_ANSWER_BYTES == MAX_MESSAGE_BYTES
    assert receive_limit({RECEIVE_KEY: "9" * 100}) == MAX_ANSWER_BYTES
    assert receive_limit({}) == DEFAULT_RECEIVE_BYTES


def test_our_own_client_takes_a_message_of_more_than_4_mib():
    class Server(inference_pb2_grpc.InferenceServiceServicer):
        def GenerateStream(self, request, context):
            metadata.update(context.invocation_metadata())
            yield pb.GenerateStreamResponse(text="x" * (5 << 20), finish_reason=pb.FINISH_REASON_STOP)

    metadata, server = {}, grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_send_message_length", -1)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Server(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        (piece,) = client.stream("hello", SamplingParams())
    server.stop(None)
    assert len(piece.text) == 5 << 20
    assert int(metadata[RECEIVE_KEY]) > 5 << 20
