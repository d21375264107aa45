"""Drains the served application, which then refuses requests."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray


@pytest.fixture
def channel(served_for_good):
    with grpc.insecure_channel(f"127.0.0.1:{served_for_good.grpc_port}") as channel:
        yield channel


def test_a_draining_server_finishes_its_streams_refuses_new_ones_and_says_so(served_for_good, channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    params = pb.SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    running = stub.GenerateStream(pb.GenerateStreamRequest(text="still here", sampling_params=params))
    num_tokens = len(next(running).token_ids)

    served_for_good.drain()  # returns when no request runs any more

    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    pieces = list(running)
    assert num_tokens + sum(len(piece.token_ids) for piece in pieces) == 300
    assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(pb.GenerateRequest(text="too late"))
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in raised.value.details()
