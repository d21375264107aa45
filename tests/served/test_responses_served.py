"""`/v1/responses` of the served application, with OpenAI's own client: two ingresses, one store."""

import time

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.ray

GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}
ASK = {"model": "demo-moe", "input": "Which experts answered?", "max_output_tokens": 12, **GREEDY}
NUM_CALLS = 8  # HAProxy gives them to both ingresses


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.http_url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_response_is_the_chats_answer_and_every_ingress_finds_it(client):
    chat = client.chat.completions.create(
        model="demo-moe", messages=[{"role": "user", "content": ASK["input"]}], max_tokens=12, **GREEDY
    )
    response = client.responses.create(**ASK)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    for _ in range(NUM_CALLS):
        assert client.responses.retrieve(response.id) == response


def test_a_response_goes_on_with_the_one_before(client):
    """As the whole conversation does, at whichever ingress."""
    first = client.responses.create(**ASK)
    whole = [
        {"role": "user", "content": ASK["input"]},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And which copies?"},
    ]
    expected = client.responses.create(**ASK | {"input": whole, "store": False})
    for _ in range(NUM_CALLS // 2):
        found = client.responses.create(**ASK | {"input": "And which copies?"}, previous_response_id=first.id)
        assert (found.output_text, found.usage) == (expected.output_text, expected.usage)


def test_a_stream_in_the_background_is_read_again_from_anywhere(client):
    events = list(client.responses.create(**ASK, stream=True, background=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    response_id = events[0].response.id
    for _ in range(2):
        again = list(client.responses.retrieve(response_id, stream=True, starting_after=5))
        assert again == events[6:]
    assert events[-1].response.output_text == client.responses.create(**ASK).output_text


def test_a_cancel_reaches_the_ingress_that_runs_it(client):
    response = client.responses.create(**ASK | {"max_output_tokens": 900}, background=True)
    assert client.responses.cancel(response.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(client.responses.create(**ASK).id)


class City(BaseModel):
    name: str
    is_large: bool


def test_an_answer_is_parsed_and_a_tools_answer_goes_back(client):
    """Both by grammars: the demo's model knows neither cities nor tools."""
    plain = {**ASK, "max_output_tokens": 200, "extra_body": {"repetition_penalty": 1.0}}
    parsed = client.responses.parse(**plain, text_format=City).output_parsed
    assert isinstance(parsed, City)
    tool = {"type": "function", "name": "weather", "strict": True, "parameters": City.model_json_schema()}
    first = client.responses.create(**plain, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    [call] = first.output
    assert call.name == "weather"
    City.model_validate_json(call.arguments)
    answer = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    second = client.responses.create(**ASK | {"input": answer}, previous_response_id=first.id, tools=[tool])
    whole = [{"role": "user", "content": ASK["input"]}, *first.output, *answer]
    assert second.output_text == client.responses.create(**ASK | {"input": whole}, tools=[tool]).output_text


def test_responses_are_kept_again_after_the_stores_death(client, ray_cluster):
    """And meanwhile they are answered."""
    lost = client.responses.create(**ASK)
    [name] = [one["name"] for one in ray_cluster.util.list_named_actors(True) if one["name"].endswith(":responses")]
    ray_cluster.kill(ray_cluster.get_actor(name, namespace="moe-cluster"), no_restart=False)
    deadline = time.monotonic() + 60
    while not (response := client.responses.create(**ASK)).store:
        assert response.output_text == lost.output_text
        assert time.monotonic() < deadline
    assert client.responses.retrieve(response.id) == response
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(lost.id)
