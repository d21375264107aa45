"""`/v1/responses` of the served application, with OpenAI's own client: two ingresses, one store."""

import time

import openai
import pytest

from cluster.runtime.names import NAMESPACE, responses_name, shard_group

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


def test_responses_are_kept_again_after_the_stores_death(client, served, ray_cluster):
    """And meanwhile they are answered."""
    lost = client.responses.create(**ASK)
    store = ray_cluster.get_actor(responses_name(shard_group(served.config)), namespace=NAMESPACE)
    ray_cluster.kill(store, no_restart=False)
    deadline = time.monotonic() + 60
    while not (response := client.responses.create(**ASK)).store:
        assert response.output_text == lost.output_text
        assert time.monotonic() < deadline
    assert client.responses.retrieve(response.id) == response
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(lost.id)
