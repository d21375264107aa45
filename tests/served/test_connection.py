"""Many calls on one connection to the served cluster: none waits where no server sees it."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_tools import samples

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray

STREAMS = 150
PLACES = 2 * (16 + 16)  # of the served cluster: two engines, each with its running and its waiting sequences


def first_word(call):
    try:
        next(call)
    except grpc.RpcError as error:
        return error.code().name
    return "answered"


def refused(served):
    """The server's count of refused requests."""
    return sum(
        sample.value
        for sample in samples(served)
        if sample.name == "moecluster_requests_total" and sample.labels["outcome"] == "resource_exhausted"
    )


def test_150_streams_of_a_connection_are_answered_or_refused_at_once_beside_a_health_call(served, channel):
    """With Serve's own setting, 100, the health call would wait until a stream ends."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    before = refused(served)
    params = pb.SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
    request = pb.GenerateStreamRequest(text="Hello", sampling_params=params)
    calls = [stub.GenerateStream(request, timeout=60) for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        words = pool.map(first_word, calls)
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert health.status == health.SERVING
        heard = list(words)
    for call in calls:
        call.cancel()
    num_refused = heard.count("RESOURCE_EXHAUSTED")
    assert num_refused + heard.count("answered") == STREAMS
    assert heard.count("answered") >= PLACES / 2
    assert refused(served) - before == num_refused > 0
