"""Ids that clients choose are names only: equal ones meet at one engine, behind one ingress or two, and harm nobody."""

import asyncio
import itertools
import logging

import pytest
from engine_fakes import make_engine
from serving_fakes import EchoBackend, TickingClock, byte_ids, make_service, write_tokenizer

from cluster.errors import ClusterError, DeadlineExceeded
from cluster.serving.replay import ReplayingBackend
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams, SequenceUpdate

A = Prompt(token_ids=byte_ids("a"))  # the engine of these tests goes on with "bcd…"


class OneEngine:
    """An engine behind any number of ingresses, as attention replica and ingress reach it: what is left before its
    end is cancelled by both of them, and both cancels find the sequence gone that ended by itself meanwhile."""

    def __init__(self):
        self.engine = make_engine(max_num_seqs=8)
        self.streams = {}

    async def generate(self, request):
        assert request.request_id not in self.streams
        news = self.streams[request.request_id] = []
        ended = False
        try:
            self.engine.submit(request)
            while not ended:
                while not news:
                    await asyncio.sleep(0)
                    for update in self.engine.step():
                        self.streams.get(update.request_id, []).append(update)
                update = news.pop(0)
                ended = update.finish_reason is not None
                yield update
        finally:
            del self.streams[request.request_id]
            if not ended:
                self.engine.cancel(request.request_id)
                self.engine.cancel(request.request_id)


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path))


def ingress(tokenizer, engine, first=0):
    """first: its own ids count from there; those of two ingresses differ."""
    service = make_service(tokenizer, ReplayingBackend(engine, max_replays=2, room_timeout_s=5.0), clock=TickingClock())
    numbers = itertools.count(first)
    service.new_request_id = lambda: f"unique-{next(numbers)}"
    return service


async def text_of(service, max_tokens=5, **more):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return (await service.generate(A, params, request_id="x", **more)).text


async def leave_after_one(service):
    deltas = service.stream(A, SamplingParams(temperature=0, max_tokens=20), request_id="x")
    assert (await anext(deltas)).text == "b"
    await deltas.aclose()


async def leave_before_the_first(service):
    asking = asyncio.create_task(text_of(service))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])


async def stop_at_a_string(service):
    params = SamplingParams(temperature=0, max_tokens=20, stop="d")
    assert (await service.generate(A, params, request_id="x")).text == "bc"


async def run_out_of_time(service):
    service._tracker._clock.tick = 1.0
    with pytest.raises(DeadlineExceeded, match="request x did not finish"):
        await text_of(service, timeout_s=3.5)
    service._tracker._clock.tick = 0.0


async def get_the_whole_answer(service):
    assert await text_of(service) == "bcdef"


@pytest.mark.parametrize(
    "end", [leave_after_one, leave_before_the_first, stop_at_a_string, run_out_of_time, get_the_whole_answer]
)
def test_an_id_can_be_used_again_at_once_however_its_request_ended(tokenizer, end):
    async def run():
        service = ingress(tokenizer, OneEngine())
        for _ in range(3):
            await end(service)
            assert await text_of(service) == "bcdef"

    asyncio.run(run())


def test_one_clients_cancel_leaves_anothers_equal_id_alone_behind_one_ingress_and_two(tokenizer):
    async def run(one, other):
        staying = asyncio.create_task(text_of(one, max_tokens=12))
        for _ in range(4):
            await asyncio.sleep(0)
            await leave_after_one(other)
        assert await staying == "bcdefghijklm"

    engine = OneEngine()
    one, other = ingress(tokenizer, engine), ingress(tokenizer, engine, first=100)
    asyncio.run(run(one, other))
    asyncio.run(run(one, one))


def test_equal_ids_run_side_by_side_and_each_gets_its_own_answer(tokenizer):
    async def run():
        service = ingress(tokenizer, OneEngine())
        assert await asyncio.gather(*(text_of(service, max_tokens=n) for n in (2, 5, 3))) == ["bc", "bcdef", "bcd"]

    asyncio.run(run())


def test_an_id_that_looks_like_a_replayed_ones_is_only_a_name(tokenizer):
    """A second attempt of "x" once travelled as "x#1", which a client could take as well."""

    async def run():
        service = ingress(tokenizer, OneEngine())
        params = SamplingParams(temperature=0, max_tokens=4)
        names = ("x", "x#1", "unique-0", "unique-1")
        asked = [service.generate(A, params, request_id=name) for name in names]
        return [(output.request_id, output.text) for output in await asyncio.gather(*asked)]

    assert asyncio.run(run()) == [(name, "bcde") for name in ("x", "x#1", "unique-0", "unique-1")]


def test_the_id_that_travels_is_unique_and_the_clients_is_its_name(tokenizer):
    backend = EchoBackend()
    service = make_service(tokenizer, backend)
    for _ in range(2):
        output = asyncio.run(service.generate(A, SamplingParams(max_tokens=4), request_id="x"))
        assert output.request_id == "x"
    assert [request.name for request in backend.requests] == ["x", "x"]
    assert len({request.request_id for request in backend.requests} | {"x"}) == 3


def test_logs_and_errors_name_a_request_as_its_client_does(tokenizer, caplog):
    backend = EchoBackend(script=[SequenceUpdate(request_id="inner", finish_reason="error")])
    service = make_service(tokenizer, backend)
    with caplog.at_level(logging.INFO, logger="cluster"), pytest.raises(ClusterError, match="request x: the engine"):
        asyncio.run(text_of(service))
    assert "request 'x' ended with internal" in caplog.text
