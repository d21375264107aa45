"""Draining the served application. Last in this folder: what it drains takes no request any more."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray


def test_a_draining_server_finishes_its_streams_refuses_new_ones_and_says_so(served, channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    params = pb.SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    running = stub.GenerateStream(pb.GenerateStreamRequest(text="still here", sampling_params=params))
    num_tokens = len(next(running).token_ids)

    served.drain()  # returns when no request runs any more

    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    pieces = list(running)
    assert num_tokens + sum(len(piece.token_ids) for piece in pieces) == 300
    assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(pb.GenerateRequest(text="too late"))
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in raised.value.details()
