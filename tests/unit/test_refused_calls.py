"""Calls that end before they are requests: each counts once in `moecluster_requests_total`."""

import asyncio

import grpc
import pytest
from http_tools import Front
from serving_fakes import EchoBackend, FakeMetrics, make_service, write_tokenizer
from test_grpc_server import BAD_REQUESTS, MAX_REQUEST_BYTES, FakeContext, Ingress

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.gate import gated_unary
from cluster.serving.health import HealthState
from cluster.serving.text.tokenizer import Tokenizer
from cluster.wire import RECEIVE_KEY

INVALID = ("invalid_argument",)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ingress_of(tokenizer, **options):
    """An ingress, and a function for the outcomes that it has counted."""
    metrics = FakeMetrics()
    service = make_service(tokenizer, EchoBackend(), metrics=metrics, max_request_bytes=MAX_REQUEST_BYTES, **options)
    return Ingress(service, HealthState()), lambda: metrics.named("finished")


async def through(stream):
    return [message async for message in stream]


def test_a_bad_message_counts_once(tokenizer):
    """Too large, no message, or without sense: before or after the request was begun, in both kinds of calls."""
    ingress, outcomes = ingress_of(tokenizer)
    bad = [request.SerializeToString() for request, _ in BAD_REQUESTS] + [b"\x0a\x02\xff\xfe"]

    async def scenario():
        for raw in bad:
            await ingress.Generate(raw, FakeContext())
            with pytest.raises(Exception, match=r"."):  # Serve's proxy sees a stream's failure so
                await through(ingress.GenerateStream(raw, FakeContext()))

    asyncio.run(scenario())
    assert outcomes() == [INVALID] * 2 * len(bad)


def test_an_answer_counts_by_its_outcome_alone(tokenizer):
    ingress, outcomes = ingress_of(tokenizer)
    asyncio.run(ingress.Generate(pb.GenerateRequest(text="a").SerializeToString(), FakeContext()))
    assert outcomes() == [("stop",)]
    context = FakeContext([(RECEIVE_KEY, "1")])
    asyncio.run(ingress.Generate(pb.GenerateRequest(text="a").SerializeToString(), context))
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert outcomes() == [("stop",)] * 2


def test_a_full_server_counts_a_refused_call_once(tokenizer):
    ingress, outcomes = ingress_of(tokenizer, room=0)
    context = FakeContext()
    asyncio.run(ingress.Generate(pb.GenerateRequest(text="a").SerializeToString(), context))
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcomes() == [("resource_exhausted",)]


def test_a_message_that_grpc_does_not_read_counts(tokenizer):
    """gRPC's own limit, 1000 bytes here: its library ends the call, the handler sees that nothing came."""
    ingress, outcomes = ingress_of(tokenizer)

    async def scenario():
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1000)])
        method = grpc.stream_unary_rpc_method_handler(
            gated_unary(lambda request, context: ingress.Generate(request, context), lambda: ingress)
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("any", {"Call": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await channel.unary_unary("/any/Call")(b"x" * 1001)
            for _ in range(1000):
                if outcomes():
                    break
                await asyncio.sleep(0.001)
        finally:
            await server.stop(None)
        return failure.value.code()

    assert asyncio.run(scenario()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcomes() == [INVALID]


BODIES = [
    ("/v1/completions", {"content": b"x" * (MAX_REQUEST_BYTES + 1)}, 413),
    ("/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
    ("/v1/completions", {"content": b"{"}, 400),
    ("/v1/completions", {"json": {"prompt": "a", "nothing": 1}}, 400),
    ("/v1/completions", {"json": {"prompt": "a", "max_tokens": 0}}, 400),
    ("/v1/completions", {"json": {"prompt": "a", "max_tokens": 10**6}}, 400),
    ("/v1/chat/completions", {"json": {"messages": []}}, 400),
]


@pytest.mark.parametrize(("path", "sent", "status"), BODIES)
def test_a_bad_body_counts_once(tokenizer, path, sent, status):
    metrics = FakeMetrics()
    front = Front(tokenizer, metrics=metrics, max_request_bytes=MAX_REQUEST_BYTES)

    async def scenario():
        async with front.client() as client:
            headers = {"content-type": "application/json"} | sent.pop("headers", {})
            return await client.post(path, headers=headers, **sent)

    assert asyncio.run(scenario()).status_code == status
    assert metrics.named("finished") == [INVALID]


def test_questions_for_everybody_and_unknown_paths_count_nothing(tokenizer):
    metrics = FakeMetrics()
    front = Front(tokenizer, metrics=metrics)
    front.health.set(False)
    statuses = [asyncio.run(front.get(path)).status_code for path in ("/ready", "/nothing", "/v1/completions")]
    assert statuses == [503, 404, 405]
    assert not metrics.named("finished")
