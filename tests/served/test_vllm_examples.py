"""The kinds of requests that vLLM's documents show, on the served application: by OpenAI's client with `extra_body`,
and as JSON for the calls that the client does not have. Source: vLLM's pages on its OpenAI-compatible server, on
structured outputs, on tool calling and on pooling models."""

import json
import re
from typing import Annotated, Literal
from urllib.request import Request, urlopen

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

pytestmark = pytest.mark.ray

MODEL = "demo-moe"
SQL = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "maxLength": 12},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
    },
}


class Car(BaseModel):
    model_config = ConfigDict(extra="forbid")
    brand: Annotated[str, Field(max_length=12)]
    car_type: Literal["sedan", "SUV", "Truck", "Coupe"]


def ask(client, text, **fields):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, seed=1, max_tokens=300, **fields)


def post(served, path, **body):
    request = Request(
        f"{served.http_url}{path}", json.dumps({"model": MODEL, **body}).encode(), {"content-type": "application/json"}
    )
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


FORMS = {
    "choice": (["positive", "negative"], lambda text: text in ("positive", "negative")),
    "regex": (r"[a-z]{1,12}@[a-z]{1,12}\.com\n", lambda text: re.fullmatch(r"[a-z]+@[a-z]+\.com\n", text)),
    "json": (Car.model_json_schema(), Car.model_validate_json),
    "grammar": (SQL, lambda text: re.fullmatch(r"SELECT col_\d  from table_\d  where col_\d = \d ", text)),
}


@pytest.mark.parametrize("kind", FORMS)
def test_structured_outputs_and_their_older_names(client, kind):
    form, fits = FORMS[kind]
    for extra_body in ({"structured_outputs": {kind: form}}, {f"guided_{kind}": form}):
        text = ask(client, "Classify this sentiment: vLLM is wonderful!", extra_body=extra_body)
        assert fits(text.choices[0].message.content)


def test_a_schema_as_response_format(client):
    schema = {"type": "json_schema", "json_schema": {"name": "car", "schema": Car.model_json_schema()}}
    text = ask(client, "Generate a car", response_format=schema).choices[0].message.content
    assert Car.model_validate_json(text)


def test_tools_by_name_and_required(client):
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        [call] = ask(
            client, "How is the weather?", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
        ).choices[0].message.tool_calls  # fmt: skip
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])


def test_extra_parameters_of_sampling(client):
    extra = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 4, "add_generation_prompt": True,
             "skip_special_tokens": True, "stop_token_ids": [], "return_token_ids": True}  # fmt: skip
    answer = ask(client, "Hello!", extra_body=extra)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens >= 4
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_log_probabilities_of_a_prompt(client):
    answer = client.completions.create(
        model=MODEL, prompt="San Francisco is a", max_tokens=4, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    first, *others = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(others) == answer.usage.prompt_tokens - 1
    assert all(min(entry["rank"] for entry in one.values()) == 1 for one in others)


def test_tokens_of_texts_and_of_chats(served):
    ids = post(served, "/tokenize", prompt="San Francisco is a", return_token_strs=True)
    assert (ids["count"], "".join(ids["token_strs"])) == (len(ids["tokens"]), "San Francisco is a")
    assert post(served, "/detokenize", tokens=ids["tokens"])["prompt"] == "San Francisco is a"
    chat = post(served, "/tokenize", messages=[{"role": "user", "content": "San Francisco"}])
    assert post(served, "/detokenize", tokens=chat["tokens"])["prompt"].endswith("<|im_start|>assistant\n")


def test_embeddings_scores_ranks_and_pooling(served):
    texts = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]
    first, second = (one["embedding"] for one in post(served, "/v1/embeddings", input=texts)["data"])
    cosine = sum(a * b for a, b in zip(first, second, strict=True))
    scores = post(served, "/score", queries=texts[0], documents=texts)["data"]
    assert [one["score"] for one in scores] == pytest.approx([1, cosine], abs=1e-5)
    ranked = post(served, "/rerank", query=texts[1], documents=texts)["results"]
    assert [one["index"] for one in ranked] == [1, 0]
    assert post(served, "/pooling", input=texts[0])["data"][0]["data"] == pytest.approx(first, abs=1e-6)
    each = post(served, "/pooling", input=texts[0], task="token_embed")["data"][0]["data"]
    assert each[-1] == pytest.approx(first, abs=1e-5)
