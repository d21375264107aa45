"""Drains the served application, which then refuses requests."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.http_streams import HttpStreams
from cluster.errors import ClusterError
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

pytestmark = pytest.mark.ray

LENGTHS = (5, 1200)  # tokens of two streams, which HAProxy gives to two ingresses

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True).with_defaults(SAMPLING_DEFAULTS)


def begun(asker, stack, max_tokens):
    """The rest of a stream over HTTP, whose first token is there; it raises if it ends without its end."""
    call = asker.stream([1, 2, 3], replace(PARAMS, max_tokens=max_tokens))
    assert len(next(call).token_ids) == 1
    return stack.enter_context(ThreadPoolExecutor(1)).submit(list, call)


def test_a_draining_server_finishes_its_streams_refuses_new_ones_and_says_so(served_for_good):
    """Also the streams of the ingress that works on when the other one has none any more."""
    with contextlib.ExitStack() as stack:

        def connect(number):
            options = [("test.number", number)]  # a connection of its own
            address = f"127.0.0.1:{served_for_good.grpc_port}"
            return stack.enter_context(grpc.insecure_channel(address, options=options))

        def start(max_tokens):
            params = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            request = pb.GenerateStreamRequest(text="still here", sampling_params=params)
            call = inference_pb2_grpc.InferenceServiceStub(connect(max_tokens)).GenerateStream(request)
            first = next(call)
            rest = stack.enter_context(ThreadPoolExecutor(1)).submit(list, call)
            return first, rest

        watch = health_pb2_grpc.HealthStub(connect(0)).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        streams = [start(max_tokens) for max_tokens in LENGTHS]
        asker = HttpStreams(served_for_good.http_url)
        over_http = [begun(asker, stack, max_tokens) for max_tokens in LENGTHS]

        served_for_good.drain()  # returns when no request runs any more

        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        for (first, rest), max_tokens in zip(streams, LENGTHS, strict=True):
            pieces = [first, *rest.result(timeout=60)]  # its last piece was on its way
            assert sum(len(piece.token_ids) for piece in pieces) == max_tokens
            assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
        for rest, max_tokens in zip(over_http, LENGTHS, strict=True):
            assert sum(len(piece.token_ids) for piece in rest.result(timeout=60)) == max_tokens - 1
        for _ in range(4):
            with pytest.raises(ClusterError, match=r"^HTTP 503: .*shutting down"):
                next(asker.stream([1, 2, 3], PARAMS))
        stub = inference_pb2_grpc.InferenceServiceStub(connect(1))
        for _ in range(4):  # every ingress refuses
            with pytest.raises(grpc.RpcError) as raised:
                stub.Generate(pb.GenerateRequest(text="too late"))
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in raised.value.details()
