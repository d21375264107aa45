"""One client does its worst to a served application: other clients and health calls are answered."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray

NOT_READING = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0))  # HTTP/2's window is very small
WATCHERS, CONNECTIONS = 105, 7
UNREAD = 20
MAX_WATCHERS = 32 * 2  # of one host at each of two ingresses, by default
LONG_TEXT = "lorem ipsum dolor sit amet " * 20_000  # half a megabyte


def greedy(max_tokens: int, **more: Any) -> pb.SamplingParams:
    return pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=max_tokens, ignore_eos=True, **more)


@pytest.fixture
def connect(served: Any) -> Iterator[Any]:
    """Opens a connection of its own."""
    with ExitStack() as stack:

        def connect(number: int, *options: tuple[str, int]) -> grpc.Channel:
            options = (*options, ("test.number", number))
            return stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=options))

        yield connect


def check(channel: grpc.Channel) -> int:
    request = health_pb2.HealthCheckRequest()
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status)


def first(watch: grpc.Call) -> str:
    """Returns SERVING once the watcher hears it (an ingress may have just started), or the code of the end."""
    try:
        while next(watch).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        return "SERVING"
    except grpc.RpcError:
        return str(watch.code().name)


def test_watchers_without_end_keep_nobody_from_an_answer(connect, channel):
    channels = [connect(number) for number in range(CONNECTIONS)]
    watches = [
        health_pb2_grpc.HealthStub(channels[n % CONNECTIONS]).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        for n in range(WATCHERS)
    ]
    answers = [first(watch) for watch in watches]
    assert answers.count("SERVING") == MAX_WATCHERS
    assert answers.count("RESOURCE_EXHAUSTED") == WATCHERS - MAX_WATCHERS
    assert check(channel) == 1
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    assert len(stub.Generate(pb.GenerateRequest(text="x", sampling_params=greedy(4)), timeout=60).token_ids) == 4
    assert stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60).model_id == "demo-moe"


def test_while_long_texts_are_tokenized_others_are_answered(connect, channel):
    long = pb.TokenizeRequest(text=LONG_TEXT)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(inference_pb2_grpc.InferenceServiceStub(connect(n)).Tokenize, long, timeout=120)
            for n in range(4)
        ]
        answered = 0
        while not all(future.done() for future in asked):
            assert check(channel) == 1
            assert stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=60).token_ids
            answered += 1
            time.sleep(0.02)  # health answers 100 a second of one host
        counts = {len(future.result().token_ids) for future in asked}
    assert len(counts) == 1
    assert answered > 10  # a pair of short calls takes milliseconds, a long one most of a second


@pytest.mark.slow
def test_streams_that_nobody_reads_stop_no_other(connect, channel):
    request = pb.GenerateStreamRequest(text="x", sampling_params=greedy(2000, logprobs=20))
    unread = [
        inference_pb2_grpc.InferenceServiceStub(connect(n, *NOT_READING)).GenerateStream(request, timeout=120)
        for n in range(UNREAD)
    ]
    reading = pb.GenerateStreamRequest(text="x", sampling_params=greedy(400))
    for _ in range(2):
        pieces = list(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(reading, timeout=120))
        assert pieces[-1].usage.completion_tokens == 400
        assert check(channel) == 1
    for call in unread:
        call.cancel()
