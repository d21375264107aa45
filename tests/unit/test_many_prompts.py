"""One call of many prompts: it is answered a part at a time, and leaves room for other clients."""

import asyncio
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
from http_tools import Front
from serving_fakes import EchoBackend, TickingClock, make_service, write_tokenizer

from cluster.errors import DeadlineExceeded
from cluster.outcome import Numbers
from cluster.serving.choices import Call, collect, generate
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams, SequenceUpdate

ROOM = 20
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class CountingBackend(EchoBackend):
    """Gives way to all others before each answer; notes the most answers of a client at a time."""

    def __init__(self, gate=None):
        super().__init__()
        self.gate = gate  # an event that "big" waits for
        self.running, self.most = Counter(), Counter()

    async def generate(self, request):
        client = request.client
        self.running[client] += 1
        self.most[client] = max(self.most[client], self.running[client])
        try:
            if self.gate is not None and client == "big":
                await self.gate.wait()
            await asyncio.sleep(0)
            async for update in super().generate(request):
                yield update
        finally:
            self.running[client] -= 1


async def post(front, client, **body):
    return await front.post(PATH, body, headers={"x-client-id": client})


def texts(answer):
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_a_call_of_more_prompts_than_places_is_answered(tokenizer):
    """20 places: 10 at a time. The answer to a prompt is the prompt."""
    backend = CountingBackend()
    front = Front(tokenizer, backend, room=ROOM)
    prompts = [chr(ord("a") + i % 26) * (1 + i % 3) for i in range(200)]
    assert texts(asyncio.run(post(front, "big", prompt=prompts))) == prompts
    assert backend.most["big"] == ROOM // 2


@pytest.mark.parametrize("asked", [{"prompt": ["a"] * 6}, {"prompt": "a", "n": 6}, {"prompt": "a" * 40, "best_of": 6}])
def test_a_call_keeps_to_the_streams_that_its_client_may_have(tokenizer, asked):
    """With 2 of a client at a time every call of more answers was refused, and told to come again."""
    backend = CountingBackend()
    front = Front(tokenizer, backend, max_streams_per_client=2)
    assert len(texts(asyncio.run(post(front, "big", **asked)))) in (1, 6)
    assert len(backend.requests) == 6
    assert backend.most["big"] == 2


def test_others_find_room_beside_a_call_of_many_prompts(tokenizer):
    """20 places, of which the call of 200 prompts has 10: ten others are answered meanwhile, and so is it in the end,
    though others have filled the room when its next prompts begin."""

    async def scenario():
        backend = CountingBackend(gate=asyncio.Event())
        front = Front(tokenizer, backend, room=ROOM)
        big = asyncio.create_task(post(front, "big", prompt=["a"] * 200))
        while backend.running["big"] < ROOM // 2:
            await asyncio.sleep(0)
        small = await asyncio.gather(*(post(front, f"small-{i}", prompt="b") for i in range(10)))
        assert [texts(one) for one in small] == [["b"]] * 10
        assert not big.done()
        with ExitStack() as others:
            for i in range(10):
                others.enter_context(front.service.admission.generation(f"other-{i}"))
            backend.gate.set()
            assert texts(await big) == ["a"] * 200
        return backend

    assert asyncio.run(scenario()).most["big"] == ROOM // 2


def test_a_call_that_has_begun_is_finished_by_a_server_that_ends(tokenizer):
    async def scenario():
        backend = CountingBackend(gate=asyncio.Event())
        front = Front(tokenizer, backend, room=ROOM)
        big = asyncio.create_task(post(front, "big", prompt=["a"] * 30))
        while not backend.running["big"]:
            await asyncio.sleep(0)
        front.service.admission.drain()
        backend.gate.set()
        refused = await post(front, "late", prompt="a")
        return texts(await big), refused.status_code

    assert asyncio.run(scenario()) == (["a"] * 30, 503)


@pytest.mark.parametrize(("limits", "most"), [({"room": 8}, 4), ({"max_streams_per_client": 2}, 2), ({}, 16)])
def test_inputs_whose_answers_are_numbers_keep_to_the_same(tokenizer, limits, most):
    """40 inputs of one call; 16 at a time is their own bound."""

    class Vectors(CountingBackend):
        def _echo(self, request):
            numbers = Numbers.of(np.array([3.0, 4.0], np.float32))
            return [SequenceUpdate(request_id=request.request_id, finish_reason="stop", numbers=numbers)]

    backend = Vectors()
    front = Front(tokenizer, backend, **limits)
    answer = asyncio.run(front.post("/v1/embeddings", {"input": ["a"] * 40}, headers={"x-client-id": "big"}))
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 40
    assert backend.most["big"] == most


def test_all_answers_of_a_call_share_its_time_budget(tokenizer):
    """Each look at the clock costs a second, of 30. The answers are made one after the other: the last ones late."""
    service = make_service(tokenizer, EchoBackend(), room=1, clock=TickingClock(1.0))
    asked = [(Prompt(text="a"), SamplingParams())] * 20
    call = Call(request_id="call", client="me", timeout_s=30.0)
    with pytest.raises(DeadlineExceeded, match=r"request call did not finish within its time budget of 30 s"):
        asyncio.run(collect(generate(service, asked, call), len(asked)))
