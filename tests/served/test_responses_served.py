"""`/v1/responses` of the served application, with OpenAI's own client: two ingresses, one store."""

import json
import time

import openai
import pytest
from served_tools import GREEDY, MESSAGES, Report, scrape, wait_until

from cluster.runtime.front import response_store
from cluster.runtime.front.shared_responses import replace_store
from cluster.runtime.names import NAMESPACE, carrier_name, responses_name, shard_group
from cluster.runtime.process import shared_actor_options
from cluster.serving.openai.responses.store import StoreLimits

pytestmark = pytest.mark.ray

ASK = {"model": "demo-moe", "input": MESSAGES[0]["content"], "max_output_tokens": 12, **GREEDY}
RANDOM = {"model": "demo-moe", "input": ASK["input"], "temperature": 1, "max_output_tokens": 700}
NUM_CALLS = 8  # HAProxy gives them to both ingresses


def test_a_response_is_the_chats_answer_and_every_ingress_finds_it(client):
    chat = client.chat.completions.create(model="demo-moe", messages=MESSAGES, max_tokens=12, **GREEDY)
    response = client.responses.create(**ASK)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    for _ in range(NUM_CALLS):
        assert client.responses.retrieve(response.id) == response


def tokens_of(response):
    """Read and written; how many were in a cache depends on what was asked before."""
    return response.usage.input_tokens, response.usage.output_tokens


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
        assert (found.output_text, tokens_of(found)) == (expected.output_text, tokens_of(expected))


def test_an_answer_is_parsed_into_a_model(client):
    parsed = client.responses.parse(text_format=Report, **RANDOM).output_parsed
    assert isinstance(parsed, Report)
    with client.responses.stream(text_format=Report, store=False, **RANDOM) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == Report.model_validate_json(final.output_text)


def test_a_tool_is_called_and_its_answer_read(client):
    """At any ingress: the second call names the first, and is answered as the whole conversation is."""
    tool = openai.pydantic_function_tool(Report, name="report")["function"]
    tools = [{"type": "function", **tool}]
    first = client.responses.parse(tools=tools, tool_choice="required", parallel_tool_calls=False, **RANDOM)
    [call] = first.output
    assert (call.type, call.name, first.status) == ("function_call", "report", "completed")
    assert Report.model_validate(call.parsed_arguments) == Report.model_validate_json(call.arguments)
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"ok": True})}
    item = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    whole = client.responses.create(**ASK | {"input": [*MESSAGES, item, answer]}, tools=tools, store=False)
    for _ in range(2):
        second = client.responses.create(**ASK | {"input": [answer]}, tools=tools, previous_response_id=first.id)
        assert (second.output_text, tokens_of(second)) == (whole.output_text, tokens_of(whole))
    assert second.usage.input_tokens > first.usage.input_tokens


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


def test_a_new_process_of_the_store_has_all_that_the_old_one_kept(client, served, ray_cluster):
    """And the response that runs meanwhile goes on: its stream has no gap. The store's metrics show both."""
    kept = client.responses.create(**ASK)
    events = iter(client.responses.create(**ASK | {"max_output_tokens": 2000}, stream=True, background=True))
    response_id = next(events).response.id
    wait_until(lambda: scrape(served)["moecluster_responses_running"] == 1, "the store counts it")
    assert scrape(served)["moecluster_responses_kept"] >= 2
    store = ray_cluster.get_actor(responses_name(shard_group(served.config)), namespace=NAMESPACE)
    before = ray_cluster.get(store.process.remote())
    assert replace_store(served.config) == "the store of responses has a new process"
    assert ray_cluster.get(store.process.remote()) != before
    for _ in range(NUM_CALLS // 2):
        assert client.responses.retrieve(kept.id) == kept
    again = iter(client.responses.retrieve(response_id, stream=True))
    num_before = client.responses.retrieve(response_id).output_text.count("")
    numbers = [next(again).sequence_number for _ in range(num_before + 20)]
    assert numbers == list(range(len(numbers)))
    assert client.responses.cancel(response_id).status == "cancelled"
    assert [event.type for event in again][-1] == "response.incomplete"
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "the cancel has come to its ingress")
    with pytest.raises(ValueError, match="carried"):
        ray_cluster.get_actor(carrier_name(shard_group(served.config)), namespace=NAMESPACE)


@pytest.mark.slow
def test_a_store_and_a_carrier_that_nobody_asks_any_more_end(ray_cluster):
    """Of a group without a controller; and Ray makes no other ones in their place."""

    class Store(response_store.ResponseStoreActor):
        def __init__(self, group):
            response_store.LOOK_S = 0.1
            super().__init__(group)

    class Carrier(response_store.ResponseCarrier):
        def __init__(self):
            response_store.CARRIED_S = 0.2
            super().__init__()

    def start(actor, name, *arguments):
        options = shared_actor_options("nobody", "") | {"name": name, "namespace": NAMESPACE}
        return ray_cluster.remote(actor).options(**options).remote(*arguments)

    store, carrier = start(Store, "nobodys-store", "nobody"), start(Carrier, "nobodys-carrier")
    ray_cluster.get([store.attend.remote(StoreLimits()), carrier.clear.remote()])

    def ended(name):
        try:
            ray_cluster.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return True
        return False

    wait_until(lambda: ended("nobodys-store") and ended("nobodys-carrier"), "both have ended")


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
