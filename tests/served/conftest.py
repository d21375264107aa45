"""Shared by the tests of the served application: OpenAI's client of it, and a conversation's answer over gRPC."""

from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest
from served_tools import MESSAGES

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.http_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def expected(stub: Any) -> pb.GenerateResponse:
    """The answer to MESSAGES over gRPC: its likeliest twelve tokens."""
    chat = pb.ChatMessages(messages=[pb.ChatMessage(**turn) for turn in MESSAGES])
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=12, ignore_eos=True)
    return stub.Generate(pb.GenerateRequest(chat=chat, sampling_params=params))
