"""A classifier behind gRPC, its positions stretched and without a tokenizer: what the command line was told arrives."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from serving_tools import Serving

from cluster.client.grpc_client import Client
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.types import SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "parity"))
from head_tools import LABELS, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

YARN = '{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}'
PROMPTS = [[5, 9, 200, 17, 3], [(7 * step) % 200 + 5 for step in range(400)]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Without any file of a tokenizer; its context ends at 256."""
    model_dir = tmp_path_factory.mktemp("classifier") / "model"
    write(model_dir, "Qwen2Moe", "ForSequenceClassification")
    return model_dir


@pytest.fixture(scope="module")
def client(model_dir, tmp_path_factory):
    serving = Serving(model_dir, tmp_path_factory.mktemp("server"), "--skip-tokenizer", "--rope-scaling", YARN)
    with Client(f"127.0.0.1:{serving.wait_ready().grpc_port}") as client:
        yield client
    serving.end()


@pytest.fixture(scope="module")
def stretched(model_dir):
    """transformers' model with the same scaling."""
    config = transformers.AutoConfig.from_pretrained(model_dir)
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    config.rope_parameters = {**config.rope_parameters, **scaling}
    config.max_position_embeddings = 512
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        model_dir, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_its_labels_are_those_of_transformers_within_and_beyond_the_old_context(client, stretched):
    assert client.model_info().max_model_len == 512
    for prompt in PROMPTS:
        answer = client.classify(prompt)
        with torch.inference_mode():
            logits = stretched(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.tensor(answer.logits), logits, atol=1e-4, rtol=0)
        assert answer.label == LABELS[str(int(logits.argmax()))]


def test_it_embeds_and_answers_nothing_else(client, stretched):
    with torch.inference_mode():
        states = stretched.model(torch.tensor([PROMPTS[1]])).last_hidden_state[0]
    found = client.embed(PROMPTS[1], pooling="mean", normalize=False).embedding
    torch.testing.assert_close(torch.tensor(found), states.mean(dim=0), atol=1e-4, rtol=0)
    assert client.model_info().head == pb.HEAD_SEQUENCE_CLASSIFICATION
    with pytest.raises(InvalidRequest, match="it answers Classify and Embed, not Generate"):
        list(client.stream(PROMPTS[0], SamplingParams(max_tokens=1)))


def test_a_text_is_refused_in_one_line(client):
    for call in (client.classify, client.embed, client.tokenize):
        with pytest.raises(InvalidRequest, match="the tokenizer, which this server has left out") as caught:
            call("hello")
        assert "\n" not in str(caught.value)
