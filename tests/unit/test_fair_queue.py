"""The order in which waiting sequences are served, and which one makes room."""

from dataclasses import replace

import pytest
from engine_fakes import Clock, make_engine, request, run_to_end
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.fair_queue import FairQueue
from cluster.engine.sequence import Sequence
from cluster.errors import Overloaded


def waiting(name, client, **fields):
    made = replace(request(name), client=client, **fields)
    return Sequence(request=made, params=made.params, stop_token_ids=frozenset(), arrived_at=0.0, deadline=None)


def drained(queue):
    return [queue.pop().request_id for _ in range(len(queue))]


def test_clients_take_turns_and_each_ones_requests_keep_their_order():
    queue = FairQueue()
    for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c"), ("c2", "c")):
        queue.append(waiting(name, client))
    assert drained(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_what_lost_its_blocks_is_next():
    queue = FairQueue()
    queue.append(waiting("a", "a"))
    queue.put_back(waiting("b", "b"))
    assert queue.peek().request_id == "b"
    assert drained(queue) == ["b", "a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["append", "put back", "pop", "remove"]))))
def test_it_holds_what_was_put_in_and_not_taken_out(steps):
    queue, inside = FairQueue(), []
    for number, (client, step) in enumerate(steps):
        if step in ("append", "put back"):
            sequence = waiting(str(number), client)
            (queue.append if step == "append" else queue.put_back)(sequence)
            inside.append(sequence)
        elif inside:
            sequence = queue.peek() if step == "pop" else inside[number % len(inside)]
            if step == "pop":
                assert queue.pop() is sequence
            else:
                queue.remove(sequence)
            inside.remove(sequence)
        assert len(queue) == len(inside)
        assert sorted(map(id, queue)) == sorted(map(id, inside))


def test_removing_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="not in"):
        FairQueue().remove(waiting("a", "a"))


def test_a_full_queue_takes_a_modest_client_and_refuses_the_greedy_ones_latest():
    clock = Clock()
    engine = make_engine(max_num_seqs=1, max_waiting=3, clock=clock)
    for i in range(4):
        engine.submit(replace(request(f"greedy-{i}"), client="greedy"))
    with pytest.raises(Overloaded):
        engine.submit(replace(request("greedy-4"), client="greedy"))
    engine.submit(replace(request("modest"), client="modest"))
    answers = run_to_end(engine)
    assert {name for name, (_, reason) in answers.items() if reason == "error"} == {"greedy-3"}
    assert answers["modest"][1] == "length"


def test_with_equal_clients_the_newcomer_is_refused():
    engine = make_engine(max_num_seqs=1, max_waiting=2)
    for i in range(3):
        engine.submit(replace(request(str(i)), client=str(i)))
    with pytest.raises(Overloaded):
        engine.submit(replace(request("new"), client="new"))


def test_the_hint_follows_the_speed_of_the_queue():
    clock = Clock()
    engine = make_engine(max_num_seqs=1, max_waiting=10, clock=clock)
    for i in range(11):
        engine.submit(request(str(i), max_tokens=1))
    for _ in range(5):
        clock.now += 2.0
        engine.step()
    with pytest.raises(Overloaded) as refused:
        for i in range(20):
            engine.submit(request(f"more-{i}"))
    assert 2.0 < refused.value.retry_after_s <= 10.0
