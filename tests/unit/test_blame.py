"""Blame of a request for the deaths of engines: engines of these tests are real ones on CountingRunners, and die."""

import asyncio
import pickle
import random
from dataclasses import replace

import pytest
from engine_fakes import Clock, make_engine, request
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.step_record import make_step_record, open_step_record
from cluster.errors import PoisonedRequest, ReplicaStopping, ReplicaUnavailable
from cluster.serving.replay import Deaths, ReplayingBackend
from cluster.types import SequenceUpdate


class Replica:
    """An engine, the record of its steps, and its streams, as an attention replica has them.

    kills: tells, of the requests in a step that is about to be computed, whether it ends the process.
    """

    def __init__(self, kills, **options):
        self.kills, self.streams, self.dead = kills, {}, False
        self.engine = make_engine(**options)
        self.record = make_step_record(64)
        self.engine.on_step = self._begin

    def _begin(self, request_ids):
        self.record.write(request_ids)
        if self.kills([request_id.partition("#")[0] for request_id in request_ids], self.engine):
            raise SystemExit

    def step(self):
        try:
            updates = self.engine.step()
        except SystemExit:
            self.dead = True
            updates = [
                SequenceUpdate(
                    request_id=request_id,
                    finish_reason="error",
                    error=ReplicaUnavailable("died", self.record.num_beside(request_id)),
                )
                for request_id in self.streams
            ]
        for update in updates:
            self.streams[update.request_id].put_nowait(update)


class Replicas:
    """A backend that gives each request to the replica with the fewest; a dead one is replaced at once."""

    def __init__(self, kills, count=2, **options):
        self.kills, self.options, self.num_deaths, self.asked = kills, options, 0, []
        self.replicas = [Replica(kills, **options) for _ in range(count)]

    async def generate(self, asked):
        self.asked.append(asked)
        replica = min(self.replicas, key=lambda each: len(each.streams))
        stream = replica.streams[asked.request_id] = asyncio.Queue()
        ended = False
        try:
            replica.engine.submit(asked)
            while not ended:
                update = await stream.get()
                ended = update.finish_reason is not None
                yield update
        finally:
            del replica.streams[asked.request_id]
            if not ended:
                replica.engine.cancel(asked.request_id)

    async def run(self):
        while True:
            for i, replica in enumerate(self.replicas):
                if replica.engine.has_work:
                    replica.step()
                if replica.dead:
                    self.num_deaths += 1
                    self.replicas[i] = Replica(self.kills, **self.options)
            await asyncio.sleep(0)


def serve(requests, kills, **options):
    """Answers by request id, tokens or the error, and the replicas."""
    replicas = Replicas(kills, **options)
    backend = ReplayingBackend(replicas, max_replays=5, room_timeout_s=5.0, clock=Clock())
    answers = {}

    async def ask(asked):
        tokens = []
        try:
            async for update in backend.generate(asked):
                tokens += update.token_ids
        except Exception as error:  # noqa: BLE001 compared below
            answers[asked.request_id] = error
        else:
            answers[asked.request_id] = tokens

    async def all_of_them():
        running = asyncio.create_task(replicas.run())
        await asyncio.gather(*(ask(asked) for asked in requests))
        running.cancel()

    asyncio.run(asyncio.wait_for(all_of_them(), 60))
    return answers, replicas


def counted(asked):
    last = asked.prompt_token_ids[-1]
    return list(range(last + 1, last + 1 + asked.params.max_tokens))


BYSTANDERS = [request(name, [10 * i + 5], max_tokens=30) for i, name in enumerate("abcdef")]


def at_token(number):
    """Ends every engine that computes the poisoned request's token of that number."""

    def kills(names, engine):
        return (
            any(
                sequence.request_id.partition("#")[0] == "poison" and sequence.num_output_tokens >= number
                for sequence in engine.scheduler.running
            )
            and "poison" in names
        )

    return kills


@pytest.mark.parametrize("number", [0, 1, 7])
def test_a_request_that_ends_every_engine_ends_two_and_then_itself_and_nobody_else(number):
    poison = request("poison", [100], max_tokens=20)
    answers, replicas = serve([*BYSTANDERS[:3], poison, *BYSTANDERS[3:]], at_token(number))
    error = answers.pop("poison")
    assert isinstance(error, PoisonedRequest)
    assert str(error) == (
        "request poison is not tried again: 2 attention replicas died in a row while they had it, without a new token "
        f"({number} generated), the last one with nothing else in its step"
    )
    assert replicas.num_deaths == 2
    assert answers == {asked.request_id: counted(asked) for asked in BYSTANDERS}


def test_two_poisoned_requests_end_two_engines_each():
    poisons = [request(f"poison{i}", [100], max_tokens=20) for i in range(2)]
    answers, replicas = serve(
        [*BYSTANDERS, *poisons], lambda names, _: any(name.startswith("poison") for name in names), count=3
    )
    assert [type(answers.pop(f"poison{i}")) for i in range(2)] == [PoisonedRequest] * 2
    assert replicas.num_deaths <= 4
    assert answers == {asked.request_id: counted(asked) for asked in BYSTANDERS}


def test_a_poisoned_request_on_an_idle_cluster_ends_two_engines():
    answers, replicas = serve([request("poison", [1])], at_token(0))
    assert isinstance(answers["poison"], PoisonedRequest)
    assert replicas.num_deaths == 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), pause=st.integers(12, 40), count=st.integers(1, 3))
def test_bystanders_survive_any_number_of_kills_that_leave_time_for_a_token_between(seed, pause, count):
    """Each kill hits a random engine in a random step, and lets all of six requests have a step of their own before
    the next one."""
    rng, steps = random.Random(seed), [0]

    def kills(_, __):
        steps[0] += 1
        if steps[0] < pause * count:
            return False
        steps[0] = -rng.randrange(10)
        return True

    answers, replicas = serve([replace(asked) for asked in BYSTANDERS], kills, count=count)
    assert answers == {asked.request_id: counted(asked) for asked in BYSTANDERS}
    for asked in replicas.asked:
        assert asked.num_alone_tokens in (0, 1, 4, 16, 64, 256)


def test_a_request_that_was_not_in_the_step_is_neither_suspected_nor_counted():
    deaths = Deaths()
    for _ in range(20):
        deaths.add(0)
    assert (deaths.num_alone_tokens, deaths.are_its_fault(5)) == (0, False)


def test_deaths_without_a_trace_are_not_survived_for_ever():
    """A request that ends engines before a step begins has no step to be found in."""
    deaths = Deaths()
    for _ in range(21):
        deaths.add(0)
    assert deaths.are_its_fault(5)
    deaths.progressed()
    deaths.add(0)
    assert not deaths.are_its_fault(5)
    assert not deaths.are_its_fault(0), "nor where a request is replayed for others' faults alone"


def test_deaths_of_which_nobody_knows_the_step_are_no_proof_but_are_counted():
    deaths = Deaths()
    for _ in range(5):
        deaths.add(None)
        assert not deaths.are_its_fault(5)
    deaths.add(None)
    assert deaths.are_its_fault(5)


def test_a_death_alone_is_no_proof_when_it_is_the_first_at_its_token():
    """On a quiet cluster every request is alone."""
    deaths = Deaths()
    for _ in range(9):
        deaths.add(1)
        assert not deaths.are_its_fault(5)
        deaths.progressed()
    assert deaths.num_alone_tokens == 0


def test_one_that_ends_engines_with_others_only_is_kept_from_them_for_longer_each_time():
    deaths, alone = Deaths(), []
    for _ in range(4):
        deaths.add(3)
        alone.append(deaths.num_alone_tokens)
        deaths.progressed()
    assert alone == [1, 4, 16, 64]


def test_a_token_that_came_with_the_word_of_the_death_is_given_on_and_counts():
    """Both in one update, as a replica sends what has gathered."""
    seen = []

    class Dying:
        async def generate(self, asked):
            seen.append(asked)
            last = (*asked.prompt_token_ids, *asked.output_token_ids)[-1]
            if len(seen) <= 3:
                died = ReplicaUnavailable("died", 1)
                yield SequenceUpdate(
                    request_id=asked.request_id, token_ids=(last + 1,), finish_reason="error", error=died
                )
            else:
                yield SequenceUpdate(request_id=asked.request_id, token_ids=(last + 1,), finish_reason="length")

    async def run():
        backend = ReplayingBackend(Dying(), max_replays=2, room_timeout_s=5.0, clock=Clock())
        return [update async for update in backend.generate(request("a", [5]))]

    updates = asyncio.run(run())
    assert [update.token_ids for update in updates] == [(6,), (7,), (8,), (9,)]
    assert [update.finish_reason for update in updates] == [None, None, None, "length"]
    assert {update.request_id for update in updates} == {"a"}


def test_a_record_is_read_by_another_process_of_the_same_file():
    record = make_step_record(2)
    assert record.num_beside("a") is None, "no step has begun"
    writer = open_step_record(record.path)
    writer.write(["a", "b"])
    assert [record.num_beside(name) for name in "abc"] == [2, 2, 0]
    writer.write(["c"])
    assert [record.num_beside(name) for name in "abc"] == [0, 0, 1]


def test_ids_that_find_no_place_in_a_record_are_not_known_to_be_elsewhere():
    record = make_step_record(1)
    record.write(["x" * 200, "y" * 200])
    assert record.num_beside("x" * 200) == 2
    assert record.num_beside("y" * 200) is None
    assert record.num_beside("z") is None


@pytest.mark.parametrize("kind", [ReplicaUnavailable, ReplicaStopping])
def test_what_a_replica_knows_of_the_death_travels(kind):
    died = pickle.loads(pickle.dumps(kind("died", 3)))
    assert (str(died), died.num_in_step) == ("died", 3)
    assert pickle.loads(pickle.dumps(kind("died"))).num_in_step is None
