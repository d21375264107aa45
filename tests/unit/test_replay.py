"""Requests that go on elsewhere: replicas of these tests count up from the last token and die on command."""

import asyncio
import itertools
from dataclasses import replace

import pytest
from engine_fakes import Clock, make_engine, request, run_to_end
from serving_fakes import EchoBackend, byte_ids, make_service, write_tokenizer

from cluster.errors import ClusterError, Overloaded, PoisonedRequest, ReplicaStopping, ReplicaUnavailable
from cluster.serving.replay import ReplayingBackend
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams, SequenceUpdate


class DyingReplicas:
    """Each attempt brings as many tokens as `lives` says and then dies; None lives to the end.

    how: "raise", "update" or "end": in which way the death is told.
    """

    def __init__(self, *lives, how="raise"):
        self.lives, self.how, self.seen, self.closed = list(lives), how, [], 0

    async def generate(self, asked):
        self.seen.append(asked)
        life = self.lives.pop(0) if self.lives else None
        if isinstance(life, Exception):
            raise life
        tokens = (*asked.prompt_token_ids, *asked.output_token_ids)
        wanted = asked.params.max_tokens - len(asked.output_token_ids)
        try:
            for n in itertools.count(1):
                if life is not None and n > life:
                    break
                reason = "length" if n == wanted else None
                yield SequenceUpdate(request_id=asked.request_id, token_ids=(tokens[-1] + n,), finish_reason=reason)
            died = ReplicaUnavailable("the attention replica died")
            if self.how == "raise":
                raise died
            if self.how == "update":
                yield SequenceUpdate(request_id=asked.request_id, finish_reason="error", error=died)
        finally:
            self.closed += 1


class DyingEchoes:
    """An echo that goes on where an earlier attempt ended; attempts die after as many tokens as `lives` says."""

    def __init__(self, lives):
        self.lives = list(lives)

    async def generate(self, asked):
        life = self.lives.pop(0) if self.lives else None
        rest = replace(asked, prompt_token_ids=asked.prompt_token_ids[len(asked.output_token_ids) :])
        async for n, update in aenumerate(EchoBackend().generate(rest)):
            if n == life:
                raise ReplicaUnavailable("the attention replica died")
            yield update


async def aenumerate(updates):
    n = 0
    async for update in updates:
        yield n, update
        n += 1


def collect(replicas, asked, clock=None, **options):
    clock = clock or Clock()

    async def sleep(seconds):
        clock.now += seconds

    backend = ReplayingBackend(
        replicas, **{"max_replays": 2, "room_timeout_s": 5.0, "clock": clock, "sleep": sleep, **options}
    )

    async def run():
        return [update async for update in backend.generate(asked)]

    return asyncio.run(run())


@pytest.mark.parametrize("how", ["raise", "update", "end"])
def test_an_answer_goes_on_at_the_next_token_however_the_death_is_told(how):
    replayed = []
    replicas = DyingReplicas(3, 0, 1, how=how)
    updates = collect(replicas, request("a", prompt=(5,), max_tokens=8), on_replay=lambda: replayed.append(1))
    assert [token for update in updates for token in update.token_ids] == [6, 7, 8, 9, 10, 11, 12, 13]
    assert [update.finish_reason for update in updates if update.finish_reason] == ["length"]
    assert {update.request_id for update in updates} == {"a"}
    assert [asked.output_token_ids for asked in replicas.seen] == [(), (6, 7, 8), (6, 7, 8), (6, 7, 8, 9)]
    assert len({asked.request_id for asked in replicas.seen}) == 4
    assert (len(replayed), replicas.closed) == (3, 4)


@pytest.mark.parametrize("lives", [(), (1,), (2,), (3, 1), (0, 5)])
def test_text_stop_strings_and_logprobs_are_those_of_a_run_without_the_death(tmp_path, lives):
    """The replicas echo "one stop two" byte by byte; the stop string is met across any of the deaths."""
    service = make_service(
        Tokenizer(write_tokenizer(tmp_path)),
        ReplayingBackend(DyingEchoes(lives), max_replays=2, room_timeout_s=5.0, on_replay=lambda: None),
    )
    params = SamplingParams(temperature=0.0, max_tokens=40, stop=("e sto",), logprobs=1)
    output = asyncio.run(service.generate(Prompt(token_ids=byte_ids("one stop two")), params))
    assert (output.text, output.finish_reason) == ("on", "stop")
    assert output.token_ids == byte_ids("one stop two")[: len(output.token_ids)]
    assert [entry.logprob for entry in output.logprobs] == [-float(token) for token in output.token_ids]


def test_every_attempt_has_the_same_seed_and_the_rest_of_the_time():
    replicas, clock = DyingReplicas(1), Clock()
    collect(replicas, request("a", temperature=1.0, timeout_s=9.0), clock, on_replay=lambda: setattr(clock, "now", 4.0))
    first, second = replicas.seen
    assert first.params.seed == second.params.seed is not None
    assert (first.timeout_s, second.timeout_s) == (9.0, 5.0)


def test_a_request_that_kills_every_replica_is_given_up():
    replicas = DyingReplicas(2, 0, 0, 0, 0)
    with pytest.raises(PoisonedRequest, match=r"request a is not .*: 3 attention replicas died in a row .*2 generated"):
        collect(replicas, request("a"))
    assert len(replicas.seen) == 3


def test_deaths_with_progress_between_them_are_not_held_against_a_request():
    assert len(collect(DyingReplicas(*[1] * 9), request("a", max_tokens=10))) == 10


def test_a_new_request_that_finds_no_room_is_refused_and_one_that_was_let_in_waits():
    full = Overloaded("the queue is full")
    with pytest.raises(Overloaded):
        collect(DyingReplicas(full), request("a"))
    replicas = DyingReplicas(1, full, full)
    assert len(collect(replicas, request("a", max_tokens=4))) == 4
    with pytest.raises(Overloaded):
        collect(DyingReplicas(1, *[full] * 100), request("a"))


def test_a_replica_that_is_on_its_way_out_is_left_to_itself():
    stopping = ReplicaStopping("it lost its engine")
    assert len(collect(DyingReplicas(*[stopping] * 9), request("a", max_tokens=4))) == 4
    with pytest.raises(ReplicaStopping):
        collect(DyingReplicas(*[stopping] * 100), request("a"))


def test_another_error_is_not_tried_again():
    replicas = DyingReplicas(ClusterError("a bug"))
    with pytest.raises(ClusterError, match="a bug"):
        collect(replicas, request("a"))
    assert len(replicas.seen) == 1


def test_an_engine_goes_on_after_the_tokens_of_an_earlier_attempt():
    engine = make_engine()
    engine.submit(replace(request("a", prompt=(1, 2), max_tokens=5), output_token_ids=(3, 4), num_replays=1))
    assert run_to_end(engine) == {"a": ([5, 6, 7], "length")}


@pytest.mark.parametrize(("given", "reason"), [((2, 3, 4, 5), "length"), ((2, 0), "stop")])
def test_an_engine_ends_a_request_that_had_all_its_tokens(given, reason):
    engine = make_engine()
    engine.submit(replace(request("a"), output_token_ids=given, num_replays=1))
    assert run_to_end(engine) == {"a": ([], reason)}


def test_a_full_queue_takes_a_request_that_was_let_in_elsewhere():
    engine = make_engine(max_num_seqs=1, max_waiting=1)
    engine.submit(request("a"))
    engine.submit(request("b"))
    with pytest.raises(Overloaded):
        engine.submit(request("d"))
    engine.submit(replace(request("c"), num_replays=1))
