"""The store of responses, and responses in the background: on a clock that runs only while all wait."""

import asyncio
import json
import pickle
from types import SimpleNamespace

import pytest
import virtual_time
from http_tools import Front
from serving_fakes import IM_END, EchoBackend, byte_ids, write_tokenizer

from cluster.errors import NotFound, Overloaded, Unavailable
from cluster.runtime.front.ingress import Ingress
from cluster.serving.openai.responses.background import MAX_OF_CLIENT, MAX_TRIES, REPORT_S, Responses
from cluster.serving.openai.responses.kept import RECORD_BYTES, KeptResponses
from cluster.serving.openai.responses.store import LOST_S, Progress, StoredResponse, StoreLimits
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def stored(name, size=0, **fields):
    return StoredResponse(response_id=name, client="me", response="r" * size, items="[]", **fields)


def kept(store, *names, client="me"):
    async def look():
        found = ""
        for name in names:
            try:
                found += (await store.get(name, client)).response_id
            except NotFound:
                found += "-"
        return found

    return asyncio.run(look())


def test_the_oldest_goes_when_there_are_too_many():
    store = KeptResponses(StoreLimits(max_responses=2))
    for name in "abc":
        asyncio.run(store.put(stored(name)))
    assert kept(store, *"abc") == "-bc"


def test_the_oldest_goes_when_there_are_too_many_bytes():
    store = KeptResponses(StoreLimits(max_bytes=100_000))
    for name in "abc":
        asyncio.run(store.put(stored(name, 40_000)))
    assert kept(store, *"abc") == "-bc"
    with pytest.raises(Overloaded, match="no room"):
        asyncio.run(store.put(stored("d", 100_000)))
    assert kept(store, *"bcd") == "bc-"


def test_a_response_goes_when_it_is_old():
    clock = Clock()
    store = KeptResponses(StoreLimits(max_age_s=60), clock)
    asyncio.run(store.put(stored("a")))
    clock.now_s = 59.0
    assert kept(store, "a") == "a"
    clock.now_s = 61.0
    assert kept(store, "a") == "-"


def test_a_store_counts_what_it_has_and_what_it_let_go():
    """Two of 1000 bytes and more, one that runs; then 61 s later all but the running one's successor are too old."""
    clock, reasons = Clock(), []
    store = KeptResponses(StoreLimits(max_responses=2, max_age_s=60), clock, reasons.append)

    def usage():
        found = store.usage()
        return found.num_kept, found.num_running

    for name in "ab":
        asyncio.run(store.put(stored(name, 1000, running=name == "b")))
    assert usage() == (2, 1)
    assert 2 * (RECORD_BYTES + 1000) < store.usage().num_bytes < 2 * (RECORD_BYTES + 1300)
    asyncio.run(store.put(stored("c")))
    assert (usage(), reasons) == ((2, 1), ["room"])
    clock.now_s = LOST_S + 1
    assert usage() == (2, 0)
    clock.now_s = 61.0
    assert (usage(), store.usage().num_bytes, reasons) == ((0, 0), 0, ["room", "age", "age"])


def test_a_successor_goes_on_where_the_store_was(monkeypatch):
    """With each response in a part of its own."""
    monkeypatch.setattr("cluster.serving.openai.responses.kept.PART_BYTES", 1)
    clock = Clock()
    store = KeptResponses(StoreLimits(max_age_s=60), clock)

    async def run():
        store_id = await store.put(stored("a"))
        clock.now_s = 50.0
        await store.put(stored("b", running=True, events=("e0", "e1")))
        parts = [pickle.loads(pickle.dumps(part)) for part in store.contents()]
        assert [len(part.responses) for part in parts] == [1, 1]
        successor = KeptResponses(clock=clock)
        for part in parts:
            successor.take(part)
        assert successor.usage() == store.usage()
        reply = await successor.report([Progress(response_id="b", response="r", first=2, events=("e2",), ended=True)])
        assert (reply.store_id, reply.stop) == (store_id, ())
        page = await successor.follow("b", "me", 0)
        assert (page.events, page.ended) == (("e0", "e1", "e2"), True)
        clock.now_s = 61.0
        with pytest.raises(NotFound):
            await successor.get("a", "me")
        assert (await successor.get("b", "me")).response == "r"

    asyncio.run(run())


def test_an_empty_store_has_contents_too():
    [part] = KeptResponses(StoreLimits(max_responses=7)).contents()
    successor = KeptResponses()
    successor.take(part)
    assert (successor.limits.max_responses, successor.usage().num_kept) == (7, 0)


def test_bytes_are_given_back():
    """A response that was put, grew, and was deleted leaves room for as much again, many times."""

    async def run():
        store = KeptResponses(StoreLimits(max_bytes=100_000))
        for _ in range(50):
            await store.put(stored("a", running=True, events=()))
            await store.report([Progress(response_id="a", response="r" * 30_000, events=("e" * 20_000,), ended=True)])
            await store.delete("a", "me")
        await store.put(stored("b", 90_000))
        await store.put(stored("c", 100_000 - 90_000 - 3 * RECORD_BYTES))
        assert (await store.get("b", "me")).response_id == "b"

    asyncio.run(run())


def test_a_response_that_grows_takes_the_room_of_the_oldest():
    async def run():
        store = KeptResponses(StoreLimits(max_bytes=100_000))
        await store.put(stored("a", 30_000))
        await store.put(stored("b", 30_000))
        await store.put(stored("c", running=True, events=()))
        await store.report([Progress(response_id="c", response="r" * 20_000, events=("e" * 30_000,))])
        return store

    assert kept(asyncio.run(run()), *"abc") == "-bc"


def test_running_responses_are_kept_before_others_and_refuse_more_of_them():
    async def run():
        store = KeptResponses(StoreLimits(max_responses=2))
        await store.put(stored("a", running=True))
        await store.put(stored("b"))
        await store.put(stored("c", running=True))
        with pytest.raises(Overloaded, match="no room"):
            await store.put(stored("d", running=True))
        return store

    assert kept(asyncio.run(run()), *"abcd") == "a-c-"


def test_nobody_else_finds_a_response():
    store = KeptResponses()
    asyncio.run(store.put(stored("a", running=True)))
    assert kept(store, "a", client="you") == "-"
    for call in (store.cancel("a", "you"), store.delete("a", "you"), store.follow("a", "you", 0)):
        with pytest.raises(NotFound):
            asyncio.run(call)
    assert asyncio.run(store.get("a", "me")).running


def test_a_report_that_comes_twice_tells_nothing_twice():
    async def run():
        store = KeptResponses()
        await store.put(stored("a", running=True, events=("0", "1")))
        for _ in range(2):
            await store.report([Progress(response_id="a", response="", first=1, events=("1", "2"))])
        assert (await store.follow("a", "me", 1)).events == ("1", "2")

    asyncio.run(run())


def test_who_follows_learns_of_each_event_and_of_the_end():
    async def run():
        store = KeptResponses(clock=asyncio.get_running_loop().time)
        await store.put(stored("a", running=True, events=("0",)))
        assert (await store.follow("a", "me", 0)).events == ("0",)
        waiting = asyncio.create_task(store.follow("a", "me", 1))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await store.report([Progress(response_id="a", response="", first=1, events=("1",))])
        assert (await waiting).events == ("1",)
        waiting = asyncio.create_task(store.follow("a", "me", 2))
        await store.report([Progress(response_id="a", response="", first=2, ended=True)])
        page = await waiting
        assert (page.events, page.num_events, page.ended) == ((), 2, True)

    virtual_time.run(run)


class Script:
    """A backend whose streams wait where the script says so; `gate` lets them go on."""

    def __init__(self, *parts):
        self.parts, self.gate, self.num_begun, self.closed = parts, asyncio.Event(), 0, 0

    async def generate(self, request):
        self.num_begun += 1
        ended = False
        try:
            for part in self.parts:
                if part is WAIT:
                    await self.gate.wait()
                elif isinstance(part, Exception):
                    if not self.gate.is_set():
                        raise part
                else:
                    for token_id in byte_ids(part):
                        yield SequenceUpdate(request_id="a", token_ids=(token_id,))
            ended = True
            yield SequenceUpdate(request_id="a", token_ids=(IM_END,), finish_reason="stop")
        finally:
            self.closed += not ended


WAIT = object()


def play(tokenizer, scenario, *parts, store=None, backend=None):
    """Runs a scenario(front, client, store) in virtual time."""

    async def run():
        nonlocal store
        store = store or KeptResponses(clock=asyncio.get_running_loop().time)
        front = Front(tokenizer, backend or Script(*parts), responses=Responses(store), max_model_len=400)
        async with front.client() as client:
            await scenario(front, client, store)

    virtual_time.run(run)


async def begin(client, **body):
    response = await client.post(PATH, json={"input": "hi", "background": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def look(client, response_id):
    return (await client.get(f"{PATH}/{response_id}")).json()


def text_of(response):
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_a_background_response_is_queued_then_runs_then_ends(tokenizer):
    async def scenario(front, client, store):
        begun = await begin(client)
        assert (begun["status"], begun["background"], begun["output"]) == ("queued", True, [])
        await asyncio.sleep(3 * LOST_S)  # it is reported all the time
        assert (await look(client, begun["id"]))["status"] == "in_progress"
        front.backend.gate.set()
        await asyncio.sleep(2 * REPORT_S)
        ended = await look(client, begun["id"])
        assert (ended["status"], text_of(ended)) == ("completed", "Hello")
        assert front.service.admission.num_running == 0

    play(tokenizer, scenario, "Hel", WAIT, "lo")


def test_a_full_cluster_makes_a_background_response_wait(tokenizer):
    async def scenario(front, client, store):
        begun = await begin(client)
        await asyncio.sleep(10.0)
        assert (await look(client, begun["id"]))["status"] == "queued"
        assert 3 < front.backend.num_begun < 7  # once in two seconds
        front.backend.gate.set()
        await asyncio.sleep(3.0)
        assert (await look(client, begun["id"]))["status"] == "completed"

    play(tokenizer, scenario, Overloaded("full", 2.0), "Hello")


def test_a_background_response_that_fails_says_why(tokenizer):
    async def scenario(front, client, store):
        begun = await begin(client)
        await asyncio.sleep(1.0)
        failed = await look(client, begun["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
        assert "shard" in failed["error"]["message"]
        answer = await client.post(PATH, json={"input": "and?", "previous_response_id": begun["id"]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")

    play(tokenizer, scenario, "Hel", Unavailable("a shard is gone"))


@pytest.mark.parametrize("call", ["cancel", "delete"])
def test_an_unwanted_background_response_is_stopped(tokenizer, call):
    async def scenario(front, client, store):
        begun = await begin(client)
        await asyncio.sleep(1.0)
        assert front.service.admission.num_running == 1
        if call == "cancel":
            answer = await client.post(f"{PATH}/{begun['id']}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        else:
            assert (await client.delete(f"{PATH}/{begun['id']}")).json()["deleted"]
        await asyncio.sleep(2 * REPORT_S)
        assert (front.service.admission.num_running, front.backend.closed) == (0, 1)
        await asyncio.sleep(1.0)
        if call == "cancel":
            cancelled = await look(client, begun["id"])
            assert (cancelled["status"], text_of(cancelled)) == ("cancelled", "Hel")
        else:
            assert (await client.get(f"{PATH}/{begun['id']}")).status_code == 404

    play(tokenizer, scenario, "Hel", WAIT, "lo")


def test_a_response_whose_process_is_gone_has_failed(tokenizer):
    async def scenario(front, client, store):
        begun = await begin(client)
        other = Front(tokenizer, Script(), responses=Responses(store))  # which asks the same store
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # as the process ends
        await asyncio.sleep(LOST_S + 1)
        response = await other.get(f"{PATH}/{begun['id']}")
        assert response.json()["status"] == "failed"
        assert "is gone" in response.json()["error"]["message"]

    play(tokenizer, scenario, WAIT)


def test_an_ingress_that_goes_ends_its_background_responses_first(tokenizer):
    """Serve awaits the class's `__del__`, which here gets an object that has what it reads."""

    async def run():
        store = KeptResponses(clock=asyncio.get_running_loop().time)
        backend, responses = Script("Hel", WAIT, "lo"), Responses(store)
        front = Front(tokenizer, backend, responses=responses, max_model_len=400)
        async with front.client() as client:
            begun = await begin(client)
            reads = SimpleNamespace(_responses=responses, _spans=None)
            going = asyncio.create_task(Ingress.__bases__[0].__del__(reads))
            await asyncio.sleep(2 * LOST_S)
            assert not going.done()
            backend.gate.set()
            await asyncio.wait_for(going, 2 * REPORT_S)
            ended = await look(client, begun["id"])
        assert (ended["status"], text_of(ended)) == ("completed", "Hello")

    virtual_time.run(run)


def test_a_response_that_was_accepted_begins_while_its_ingress_drains(tokenizer):
    """It waits for room when that begins, and counts as under way until it has ended."""

    async def scenario(front, client, store):
        begun = await begin(client)
        await asyncio.sleep(3.0)
        ingress = SimpleNamespace(_admission=front.service.admission, _health=front.health, _responses=front.responses)
        drain = Ingress.__bases__[0].drain
        assert await drain(ingress) == 1
        front.backend.gate.set()
        await asyncio.sleep(3.0)
        ended = await look(client, begun["id"])
        assert (ended["status"], text_of(ended)) == ("completed", "Hello")
        assert await drain(ingress) == 0
        refused = await client.post(PATH, json={"input": "hi", "background": True})
        assert refused.status_code == 503

    play(tokenizer, scenario, Overloaded("full", 2.0), "Hello")


class Forgetful:
    """A store whose process ends and comes again, empty."""

    def __init__(self, clock):
        self._clock = clock
        self.up()

    def up(self):
        self._store = KeptResponses(clock=self._clock)

    def down(self):
        self._store = None

    def set_limits(self, limits):
        self._store.limits = limits

    def __getattr__(self, name):
        if self._store is None:
            raise Unavailable("the store does not answer")
        return getattr(self._store, name)


def test_what_runs_outlives_the_stores_death(tokenizer):
    """Its clients read on, and the next store gets all of it."""

    async def run():
        store = Forgetful(asyncio.get_running_loop().time)
        backend = Script("Hel", WAIT, "lo")
        front = Front(tokenizer, backend, responses=Responses(store), max_model_len=400)
        reading = asyncio.create_task(front.post(PATH, {"input": "hi", "background": True, "stream": True}))
        await asyncio.sleep(1.0)
        store.down()
        await asyncio.sleep(5.0)
        foreground = asyncio.create_task(front.post(PATH, {"input": "hi"}))
        backend.gate.set()
        response = (await foreground).json()
        assert (response["status"], text_of(response), response["store"]) == ("completed", "Hello", False)
        assert (await front.get(f"{PATH}/{response['id']}")).status_code == 503
        store.up()
        events = [json.loads(block.split("data: ")[1]) for block in (await reading).text.strip().split("\n\n")]
        assert events[-1]["type"] == "response.completed"
        await asyncio.sleep(1.0)
        again = await front.get(f"{PATH}/{events[0]['response']['id']}?stream=true")
        assert [json.loads(block.split("data: ")[1]) for block in again.text.strip().split("\n\n")] == events

    virtual_time.run(run)


def test_a_store_that_never_comes_back_is_given_up(tokenizer):
    async def run():
        store = Forgetful(asyncio.get_running_loop().time)
        responses = Responses(store)
        front = Front(tokenizer, Script("Hello"), responses=responses, max_model_len=400)
        await front.post(PATH, {"input": "hi", "background": True})
        store.down()
        await asyncio.wait_for(responses.drained(), (MAX_TRIES + 2) * REPORT_S)

    virtual_time.run(run)


def test_a_report_that_finds_no_room_is_made_again(tokenizer, caplog):
    """To a store that has lost the response and is full; its log has the first of many equal faults alone."""

    async def run():
        store = Forgetful(asyncio.get_running_loop().time)
        backend = Script("Hel", WAIT, "lo")
        front = Front(tokenizer, backend, responses=Responses(store), max_model_len=400)
        async with front.client() as client:
            begun = await begin(client)
            store.down()
            await asyncio.sleep(10.0)
            assert caplog.text.count("the store does not learn of 1 responses") == 1
            store.up()
            store.set_limits(StoreLimits(max_responses=0))
            await asyncio.sleep(10.0)
            assert caplog.text.count(f"no room for response {begun['id']}") == 1
            assert (await client.get(f"{PATH}/{begun['id']}")).status_code == 404
            store.set_limits(StoreLimits())
            await asyncio.sleep(2 * REPORT_S)
            backend.gate.set()
            await asyncio.sleep(2 * REPORT_S)
            assert text_of(await look(client, begun["id"])) == "Hello"

    virtual_time.run(run)


def test_nothing_is_asked_of_the_store_for_what_is_not_kept(tokenizer):
    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    async def scenario(front, client, store):
        for stream in (False, True):
            answer = await client.post(PATH, json={"input": "hi", "store": False, "stream": stream})
            assert answer.status_code == 200
        assert answer.text.count("Hello") > 1

    play(tokenizer, scenario, "Hello", store=Untouched())


def test_a_server_that_keeps_none_says_so(tokenizer):
    front = Front(tokenizer, EchoBackend(), responses=Responses(None), max_model_len=400)

    async def run():
        assert (await front.post(PATH, {"input": "hi"})).json()["store"] is False
        for body in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}):
            refused = await front.post(PATH, {"input": "hi", **body})
            assert refused.status_code == 400
        assert (await front.get(f"{PATH}/resp_1")).status_code == 404

    asyncio.run(run())


def test_one_client_does_not_take_all_places_of_the_background(tokenizer):
    """They come at once: the store has none yet when the last one asks."""

    async def scenario(front, client, store):
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_OF_CLIENT):
                group.create_task(begin(client))
        refused = await client.post(PATH, json={"input": "hi", "background": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        async with front.client(peer="192.0.2.8") as other:
            await begin(other)
        front.service.admission.drain()
        refused = await client.post(PATH, json={"input": "hi", "background": True})
        assert refused.status_code == 503

    play(tokenizer, scenario, WAIT)
