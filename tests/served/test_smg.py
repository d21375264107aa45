"""The Shepherd Model Gateway (PyPI's smg) in front of the served cluster, an attention replica of which is killed."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from client_tools import QUIET, with_clients
from served_tools import MESSAGES, scrape, wait_until

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.front.haproxy import free_block

pytestmark = [pytest.mark.ray, pytest.mark.slow, with_clients]
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}


@pytest.fixture
def gateway(served, tmp_path):
    """OpenAI's client of a gateway whose one worker is the cluster."""
    ports = free_block(2)
    command = [
        Path(os.environ["CLIENTS"]).parent / "smg", "launch", "--worker-urls", f"grpc://127.0.0.1:{served.grpc_port}",
        "--host", "127.0.0.1", "--port", str(ports[0]), "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(ports[1]), "--disable-retries", "--log-level", "info",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env={**os.environ, **QUIET})
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{ports[0]}/v1", api_key="any", max_retries=0)

    def ready():
        assert process.poll() is None, (tmp_path / "log").read_text()
        with suppress(openai.OpenAIError):  # it knows the model's name before it has the tokenizer
            return client.completions.create(model="demo-moe", prompt="Hi", max_tokens=1).choices != []
        return False

    try:
        wait_until(ready, "the gateway answers")
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(30)


def test_openais_calls_through_the_gateway_have_our_texts(gateway, expected, stub):
    asked = {"model": "demo-moe", "max_tokens": 12, **GREEDY}
    chat = gateway.chat.completions.create(messages=MESSAGES, **asked)
    assert chat.choices[0].message.content == expected.text
    assert chat.usage.completion_tokens == 12
    again = [
        gateway.chat.completions.create(messages=MESSAGES, **asked).usage for _ in range(2)
    ]  # there are two replicas
    assert (
        max(usage.prompt_tokens_details.cached_tokens for usage in again) == (chat.usage.prompt_tokens - 1) // 16 * 16
    )
    pieces = gateway.chat.completions.create(messages=MESSAGES, stream=True, **asked)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected.text
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=12, ignore_eos=True)
    text = stub.Generate(pb.GenerateRequest(text="Hello", sampling_params=params)).text
    assert gateway.completions.create(prompt="Hello", **asked).choices[0].text == text


def test_a_killed_replica_costs_the_gateways_streams_no_token(gateway, served):
    asked = {"model": "demo-moe", "messages": MESSAGES, "max_tokens": 300, **GREEDY}
    expected = gateway.chat.completions.create(**asked).choices[0].message.content
    begun, texts = threading.Barrier(5, timeout=60), [""] * 4

    def read(index):
        for piece in gateway.chat.completions.create(stream=True, **asked):
            if piece.choices and piece.choices[0].delta.content:
                if not texts[index]:
                    begun.wait()
                texts[index] += piece.choices[0].delta.content

    readers = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(4)]
    for reader in readers:
        reader.start()
    begun.wait()
    before = scrape(served)["moecluster_request_replays_total"]
    os.kill(served.status().replicas[0].process.pid, signal.SIGKILL)
    for reader in readers:
        reader.join(120)
    assert texts == [expected] * 4
    assert scrape(served)["moecluster_request_replays_total"] > before


def test_a_client_that_leaves_the_gateway_frees_its_blocks(gateway, served):
    asked = {"model": "demo-moe", "messages": MESSAGES, "max_tokens": 2000, "stream": True, **GREEDY}
    stream = gateway.chat.completions.create(**asked)
    next(iter(stream))
    assert scrape(served)["moecluster_engine_running_sequences"] > 0
    stream.close()
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free")
