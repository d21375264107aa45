"""The HTTP front against its own OpenAPI document: schemathesis makes calls of it, of good and of bad values."""

import asyncio
import re
from collections import defaultdict

import numpy as np
import pytest
import schemathesis
from http_tools import Front
from schemathesis.engine import events, from_schema
from serving_fakes import EchoBackend, write_tokenizer
from test_results_served import SEQUENCE, NumbersBackend

from cluster.outcome import Head, Numbers
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate

INSIDE = re.compile(r"Traceback|\.py\b|site-packages|/home/|/tmp/|0x[0-9a-f]{6}|object at")
STATUSES = (200, 400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
CHECKS = {
    # A value may be of its type and range and yet fit no model, no context or no other field.
    "positive_data_acceptance": {"enabled": False},
    "negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 413, 415]},
}


class Backend(NumbersBackend):
    """Answers with tokens or with numbers, as a request wants. Each token of a prompt is its own likeliest one."""

    def __init__(self):
        super().__init__()
        self.tokens = EchoBackend(step=2)

    def generate(self, request):
        return self.tokens.generate(request) if request.wants == "tokens" else super().generate(request)

    def answer(self, request):
        ids = request.prompt_token_ids
        if request.wants == "token_logprobs":
            rows = [[-1.0, 1.0, token, -1.0] for token in ids[1:]]
        elif request.wants == "hidden_states":
            rows = [[1.0, token, 0.0, 0.0] for token in ids]
        else:
            return super().answer(request)
        numbers = Numbers.of(np.array(rows, dtype=np.float32).reshape(-1, 4))
        return SequenceUpdate(request_id=request.request_id, numbers=numbers, finish_reason="stop")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def checked(front, *, max_examples, seed):
    """Asks every call of the document. Returns the statuses that each has answered with."""
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            "generation": {"max-examples": max_examples, "database": "none"},
            "phases": {"stateful": {"enabled": False}},
            "checks": CHECKS,
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", front.app, config=config)
    statuses, faults = defaultdict(set), []
    for one in from_schema(schema).execute():
        assert not isinstance(one, events.NonFatalError | events.FatalError), one
        if not isinstance(one, events.ScenarioFinished):
            continue
        recorder = one.recorder
        for found in (found for each in recorder.checks.values() for found in each if found.failure_info):
            faults.append(f"{recorder.label}: {found.failure_info.failure}\n{found.failure_info.code_sample}")
        for interaction in recorder.interactions.values():
            statuses[recorder.label].add(interaction.response.status_code)
            if INSIDE.search(interaction.response.text):
                faults.append(f"{recorder.label}: {interaction.response.text}")
    assert not faults, "\n\n".join(faults[:5])
    return statuses


GENERATIONS = {f"POST /v1/{name}" for name in ("chat/completions", "completions", "messages", "responses")}
NUMBERS = {"POST /v1/embeddings", "POST /pooling", "POST /score"}


@pytest.mark.parametrize(
    ("max_examples", "seed", "head", "answered"),
    [
        (5, 1, Head(), GENERATIONS | NUMBERS),
        pytest.param(60, 2, Head(), GENERATIONS | NUMBERS, marks=pytest.mark.slow),
        pytest.param(30, 3, SEQUENCE, NUMBERS | {"POST /classify"}, marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_as_the_document_has_it(tokenizer, max_examples, seed, head, answered):
    """And so is every refusal; nothing of the inside is in any of them. answered: calls that are for such a head."""
    front = Front(tokenizer, Backend(), max_request_bytes=1 << 20, head=head)
    statuses = checked(front, max_examples=max_examples, seed=seed)
    assert len(statuses) >= 16
    assert {label for label, seen in statuses.items() if 200 in seen} >= answered
    assert front.service.admission.num_running == 0


def test_without_a_key_every_call_but_questions_is_refused_in_its_apis_shape(tokenizer, tmp_path):
    file = tmp_path / "keys"
    file.write_text(new_key("alice")[1] + "\n")
    front = Front(tokenizer, Backend(), keys=ApiKeys(file, lambda: 0.0))

    async def run():
        async with front.client() as client:
            document = (await client.get("/openapi.json")).json()
            every = [(path, *one) for path, methods in document["paths"].items() for one in methods.items()]
            for path, method, operation in every:
                answer = await client.request(method, path)
                assert (answer.status_code == 200) == ("security" not in operation), path
                if answer.status_code == 200:
                    continue
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                error = answer.json()["error"]
                assert error["type"] == "authentication_error"
                assert ("code" in error) != path.startswith("/v1/messages")

    asyncio.run(run())


def test_the_document_has_all_that_a_client_meets(tokenizer):
    document = asyncio.run(Front(tokenizer).get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {str(status) for status in STATUSES}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "ErrorFields" in str(document["components"]["schemas"]["OpenAIError"])
    anthropics = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]["application/json"]
    assert anthropics["schema"]["$ref"].endswith("/AnthropicError")
    assert "security" not in document["paths"]["/health"]["get"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"type": "number", "minimum": 0.0, "maximum": 100.0} in fields["temperature"]["anyOf"]
    assert "422" not in str(document)
