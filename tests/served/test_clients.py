"""Other programs' clients on the served application: each script of tests/clients/ in an environment of its own.

`$CLIENTS` is the Python of an environment with what tests/clients/requirements.txt names, `$OPENAI_NPM` a folder with
npm's package openai (CONTRIBUTING.md); `.ci/run` makes both. Without them these tests are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray

SCRIPTS = Path(__file__).resolve().parents[1] / "clients"
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGCHAIN_TRACING_V2": "false", "HF_HUB_OFFLINE": "1"}
with_clients = pytest.mark.skipif("CLIENTS" not in os.environ, reason="CLIENTS names no Python with the clients")
with_npm = pytest.mark.skipif(
    "OPENAI_NPM" not in os.environ or shutil.which("node") is None, reason="OPENAI_NPM names no folder of npm's openai"
)


def run(*command, **environment):
    """Fails with all that the client wrote."""
    found = subprocess.run(
        [str(word) for word in command], env={**os.environ, **QUIET, **environment}, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    return found.stdout


@pytest.fixture
def arguments(served, channel):
    """Of each script: the server's address, the model, and the greedy text of the conversation's next twelve tokens
    over gRPC."""
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Which experts answered?")])
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=12, ignore_eos=True)
    request = pb.GenerateRequest(chat=chat, sampling_params=params)
    text = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request).text
    return served.http_url, "demo-moe", text


@with_clients
@pytest.mark.parametrize("script", ["langchain_chat.py", "litellm_calls.py"])
def test_python_clients(arguments, script):
    run(os.environ["CLIENTS"], SCRIPTS / script, *arguments)


@with_npm
def test_openais_client_for_javascript(arguments):
    run("node", SCRIPTS / "chat.mjs", *arguments, OPENAI_NPM=f"{os.environ['OPENAI_NPM']}/")
