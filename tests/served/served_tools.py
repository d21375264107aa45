"""Shared by the tests of the served application: questions for it, metrics and Ray's objects as numbers, waiting."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field

from cluster.client.direct import read_url
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

MESSAGES = [{"role": "user", "content": "Which experts answered?"}]
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}  # for OpenAI's client


class Step(BaseModel):
    expert: Annotated[int, Field(ge=0, le=63)]
    verdict: Literal["busy", "idle", "gone"]


class Report(BaseModel):
    """Of a layer: at most four of its experts."""

    layer: Annotated[int, Field(ge=0, le=23)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=4)]


def samples(served: Any) -> list[Any]:
    """All samples that a scrape of /metrics shows now, with their labels."""
    text = read_url(served.status().metrics_addresses[0], timeout_s=60.0)
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def scrape(served: Any) -> dict[str, float]:
    """Sums of all samples by their name, over all labels."""
    sums: dict[str, float] = {}
    for sample in samples(served):
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def plasma_objects(ray_cluster: Any) -> int:
    """Objects in this Ray's object store."""
    from ray._private.internal_api import memory_summary

    address = ray_cluster.get_runtime_context().gcs_address
    for line in memory_summary(address, stats_only=True).splitlines():
        if "Plasma memory usage" in line:
            return int(line.split(",")[1].split()[0])
    raise AssertionError("no line about plasma in Ray's memory summary")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Asks ten times a second; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s} s"
        time.sleep(0.1)


@contextmanager
def beside(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Runs `work` in a thread until the block is left, which sets its event. Raises what it raised."""
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, ended)
        try:
            yield
        finally:
            ended.set()
        running.result()


def check_health_reflection_and_streaming(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"moecluster.v1.InferenceService", "grpc.health.v1.Health"} <= names
        params = pb.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        pieces = list(stub.GenerateStream(pb.GenerateStreamRequest(text="hello", sampling_params=params)))
        assert sum(len(piece.token_ids) for piece in pieces) == 20
        assert len(pieces) > 2
