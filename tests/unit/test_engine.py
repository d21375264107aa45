"""The engine's step on a runner whose tokens can be counted on the fingers (see CountingRunner)."""

from dataclasses import replace

import pytest
from engine_fakes import EOS, Clock, make_engine, request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.loop import EngineLoop
from cluster.errors import DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled, ShardUnavailable


def test_a_prompt_is_answered_up_to_max_tokens():
    engine = make_engine()
    engine.submit(request("a", [5], max_tokens=3))
    assert run_to_end(engine) == {"a": ([6, 7, 8], "length")}
    assert engine.blocks.num_used == 0


def test_updates_say_how_much_of_the_beginning_was_in_the_cache():
    """Blocks of 4: of 9 tokens the second has two blocks; a third begins at the same step, before they are known."""
    engine = make_engine(num_blocks=20)
    engine.submit(request("a", range(10, 19), max_tokens=1))
    engine.submit(request("b", range(10, 19), max_tokens=1))
    first = {update.request_id: update.cached_tokens for update in engine.step()}
    engine.submit(request("c", range(10, 19), max_tokens=2))
    engine.submit(request("d", [*range(10, 19), 19, 20], max_tokens=1))
    later = [(update.request_id, update.cached_tokens) for _ in range(2) for update in engine.step()]
    assert first == {"a": 0, "b": 0}
    assert sorted(later) == [("c", 8), ("c", 8), ("d", 8)]


def test_what_was_cached_at_its_beginning_stays_when_a_sequence_is_computed_again():
    """Three blocks of 4 for two sequences of 3 tokens: the second gives way, and finds its own beginning again."""
    engine = make_engine(num_blocks=3)
    engine.submit(request("a", [1, 2, 3], max_tokens=6))
    engine.submit(request("b", [11, 12, 13], max_tokens=4))
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert {update.cached_tokens for update in updates} == {0}
    assert engine.scheduler.running == []


def test_a_later_request_joins_the_running_batch():
    engine = make_engine()
    engine.submit(request("a", [1], max_tokens=3))
    engine.step()
    engine.submit(request("b", [7, 8], max_tokens=1))
    run_to_end(engine)
    assert engine.runner.steps == [[("a", 1)], [("a", 1), ("b", 2)], [("a", 1)]]


def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes_of_others():
    """Budget 4: a's decode takes one token of each step, b's prompt of 7 the three that are left."""
    engine = make_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1], max_tokens=5))
    engine.step()
    engine.submit(request("b", range(10, 17), max_tokens=1))
    answers = run_to_end(engine)
    assert engine.runner.steps[1:4] == [[("a", 1), ("b", 3)], [("a", 1), ("b", 3)], [("a", 1), ("b", 1)]]
    assert answers["b"] == ([17], "length")


def test_max_num_seqs_bounds_a_step():
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.submit(request(name, max_tokens=2))
    run_to_end(engine)
    assert [len(step) for step in engine.runner.steps] == [2, 2, 1, 1]


def test_when_blocks_run_out_the_latest_arrival_is_computed_again():
    """Three blocks of 4: both start with one; at 5 tokens each wants a second. b gives way, and comes back with its
    prompt and what it had generated, as one prompt of 5."""
    engine = make_engine(num_blocks=3, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3], max_tokens=4))
    engine.submit(request("b", [11, 12, 13], max_tokens=4))
    answers = run_to_end(engine)
    assert answers == {"a": ([4, 5, 6, 7], "length"), "b": ([14, 15, 16, 17], "length")}
    assert ("b", 5) in [item for step in engine.runner.steps for item in step]
    assert engine.blocks.num_used == 0


def test_a_preempted_sequence_finds_its_full_blocks_again():
    """As above, but b's first block of 4 is still there when it comes back: one token is left to compute."""
    engine = make_engine(num_blocks=3)
    engine.submit(request("a", [1, 2, 3], max_tokens=4))
    engine.submit(request("b", [11, 12, 13], max_tokens=4))
    answers = run_to_end(engine)
    assert answers["b"] == ([14, 15, 16, 17], "length")
    assert ("b", 5) not in [item for step in engine.runner.steps for item in step]


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs():
    """Blocks of 4: of a's 10 tokens two blocks are full; b shares both, c the first, d (the same 8) the first, since
    its last token must be computed."""
    engine = make_engine()
    engine.submit(request("a", range(1, 11), max_tokens=1))
    run_to_end(engine)
    computed = {}
    for name, prompt in (
        ("b", [1, 2, 3, 4, 5, 6, 7, 8, 50, 51]), ("c", [1, 2, 3, 4, 60, 6, 7, 8]), ("d", range(1, 9)),
        ("e", [0, 2, 3, 4, 5, 6, 7, 8]),
    ):  # fmt: skip
        engine.submit(request(name, prompt, max_tokens=1))
        run_to_end(engine)
        computed |= dict(engine.runner.steps[-1])
    assert computed == {"b": 2, "c": 4, "d": 4, "e": 8}
    assert engine.blocks.num_used == 0


def test_shared_blocks_stay_while_one_sequence_holds_them():
    engine = make_engine()
    engine.submit(request("a", range(8), max_tokens=20))
    engine.step()
    engine.submit(request("b", [*range(8), 30], max_tokens=20))
    engine.step()
    tables = [sequence.block_tables[0].held().tolist() for sequence in engine.sequences.values()]
    assert tables[0][:2] == tables[1][:2]
    engine.cancel("a")
    assert engine.blocks.num_used == len(tables[1])
    engine.cancel("b")
    assert engine.blocks.num_used == 0


def test_the_block_that_is_idle_longest_is_taken_first():
    """Four blocks of 4. a leaves a full one, b another, later; c needs three blocks: two fresh ones and a's."""
    engine = make_engine(num_blocks=4)
    for name, first in (("a", 10), ("b", 20)):
        engine.submit(request(name, range(first, first + 4), max_tokens=1))
        run_to_end(engine)
    engine.submit(request("c", range(40, 51), max_tokens=1))
    run_to_end(engine)
    computed = {}
    for name, first in (("b2", 20), ("a2", 10)):
        engine.submit(request(name, [*range(first, first + 4), 99], max_tokens=1))
        run_to_end(engine)
        computed |= dict(engine.runner.steps[-1])
    assert computed == {"b2": 1, "a2": 5}


def test_an_eos_token_ends_the_output_and_is_part_of_it():
    engine = make_engine()
    engine.submit(request("a", [EOS - 1], max_tokens=9))
    assert run_to_end(engine) == {"a": ([EOS], "stop")}


def test_ignore_eos_goes_on():
    engine = make_engine()
    engine.submit(request("a", [-1], max_tokens=3, ignore_eos=True))
    assert run_to_end(engine) == {"a": ([0, 1, 2], "length")}


def test_a_stop_token_ends_the_output():
    engine = make_engine()
    engine.submit(request("a", [5], max_tokens=9, stop_token_ids=[8]))
    assert run_to_end(engine) == {"a": ([6, 7, 8], "stop")}


def test_a_full_queue_refuses():
    engine = make_engine(max_num_seqs=1, max_waiting=1)
    engine.submit(request("a"))
    engine.step()
    engine.submit(request("b"))
    with pytest.raises(Overloaded, match=r"the queue is full \(1 requests wait\): try again in 0.1 s"):
        engine.submit(request("c"))
    assert set(run_to_end(engine)) == {"a", "b"}


def test_a_burst_between_two_steps_may_fill_the_batch_and_the_queue():
    """Two run and one waits: the fourth is refused, though no step has begun yet."""
    engine = make_engine(max_num_seqs=2, max_waiting=1)
    for name in "abc":
        engine.submit(request(name))
    with pytest.raises(Overloaded):
        engine.submit(request("d"))
    assert set(run_to_end(engine)) == {"a", "b", "c"}


def test_without_a_queue_the_batch_may_still_be_filled():
    engine = make_engine(max_num_seqs=2, max_waiting=0)
    for name in "ab":
        engine.submit(request(name))
    with pytest.raises(Overloaded, match="all 2 places are taken"):
        engine.submit(request("c"))
    assert set(run_to_end(engine)) == {"a", "b"}


def test_what_can_never_fit_the_cache_is_refused():
    engine = make_engine(num_blocks=2)
    with pytest.raises(InvalidRequest, match="is 9, the KV cache holds 8"):
        engine.submit(request("a", [1] * 8, max_tokens=1))
    assert not engine.has_work


def test_what_is_longer_than_the_context_is_refused():
    engine = make_engine(max_model_len=10)
    with pytest.raises(InvalidRequest, match="is 11, the context has 10"):
        engine.submit(request("a", [1] * 7, max_tokens=4))


def test_a_request_id_in_use_is_refused():
    engine = make_engine()
    engine.submit(request("a"))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.submit(request("a"))


def test_a_cancel_frees_blocks_before_the_next_step():
    engine = make_engine()
    engine.submit(request("a", [1] * 9, max_tokens=50))
    engine.step()
    assert engine.blocks.num_used == 3
    engine.cancel("a")
    assert engine.blocks.num_used == 0
    [update] = engine.step()
    assert (update.request_id, update.finish_reason) == ("a", "cancelled")
    assert not engine.has_work


def test_a_cancel_that_comes_before_its_request_is_kept():
    engine = make_engine()
    engine.cancel("late")
    with pytest.raises(RequestCancelled):
        engine.submit(request("late"))
    engine.submit(request("late"))  # a new request of the same id, later
    assert run_to_end(engine)["late"][1] == "length"


def test_an_expired_sequence_ends_within_one_step():
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.submit(request("a", max_tokens=50, timeout_s=2.0))
    engine.submit(request("b", max_tokens=3))
    engine.step()
    clock.now = 2.0
    ended = [update for update in engine.step() if update.finish_reason]
    assert [update.request_id for update in ended] == ["a"]
    assert isinstance(ended[0].error, DeadlineExceeded)
    assert engine.runner.steps[-1] == [("b", 1)]


def test_lost_experts_fail_their_batch_and_the_engine_goes_on():
    engine = make_engine()
    engine.submit(request("a"))
    error = ShardUnavailable("shard 1 is gone", 1)
    engine.runner.errors.append(error)
    [update] = engine.step()
    assert (update.finish_reason, update.error) == ("error", error)
    assert engine.blocks.num_used == 0
    engine.submit(request("b", [1], max_tokens=1))
    assert run_to_end(engine) == {"b": ([2], "length")}


def test_sequences_that_need_a_lost_expert_are_held_and_the_others_go_on():
    """a is lost at its second token. It takes part in no step until the plan changes, then goes on with that token."""
    engine = make_engine()
    engine.submit(request("a", [5], max_tokens=3))
    engine.submit(request("b", [7], max_tokens=6))
    engine.step()
    engine.runner.lost = {"a"}
    for _ in range(3):
        engine.step()
    assert engine.runner.steps == [[("a", 1), ("b", 1)], [("a", 1), ("b", 1)], [("b", 1)], [("b", 1)]]
    assert (engine.stats().running, engine.stats().held) == (2, 1)
    engine.runner.lost, engine.runner.epoch = set(), 2
    answers = run_to_end(engine)
    assert engine.runner.steps[4:] == [[("a", 1), ("b", 1)], [("a", 1), ("b", 1)]]
    assert answers == {"a": ([7, 8], "length"), "b": ([12, 13], "length")}
    assert engine.blocks.num_used == 0


def test_a_held_sequence_tries_again_without_news_after_a_while():
    """A broken connection changes no plan."""
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.submit(request("a", [5], max_tokens=2))
    engine.runner.lost = {"a"}
    for clock.now in (0.0, 0.5, 0.9, 1.0, 1.5, 2.0):
        engine.step()
    assert len(engine.runner.steps) == 3
    assert engine.runner.waits == 3, "with nothing to compute it waits for news, and does not spin"
    engine.runner.lost = set()
    clock.now = 3.0
    assert run_to_end(engine) == {"a": ([6, 7], "length")}


def test_a_sequence_that_others_join_on_hold_is_not_held_longer():
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.submit(request("a", [5], max_tokens=9))
    engine.submit(request("b", [5], max_tokens=9))
    engine.runner.lost = {"a"}
    engine.step()
    clock.now, engine.runner.lost = 0.9, {"a", "b"}
    engine.step()
    clock.now, engine.runner.lost = 1.0, set()
    engine.step()
    assert engine.runner.steps[-1] == [("a", 1), ("b", 1)]


def test_a_held_sequence_ends_when_its_expert_is_not_back_in_the_recovery_time():
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.submit(request("a", [5], max_tokens=9))
    engine.submit(request("b", [7], max_tokens=200))
    engine.runner.lost = {"a"}
    updates = []
    while clock.now < 9.9:
        updates += engine.step()
        clock.now += 0.1
    assert [update for update in updates if update.request_id == "a"] == []
    for _ in range(15):
        updates += engine.step()
        clock.now += 0.1
    [ended] = [update for update in updates if update.request_id == "a"]
    assert (ended.finish_reason, type(ended.error)) == ("error", ShardUnavailable)
    assert sum(update.request_id == "b" for update in updates) == len(engine.runner.steps)


def test_the_recovery_time_begins_anew_with_each_loss():
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.submit(request("a", [5], max_tokens=99))
    for clock.now in range(0, 40, 4):
        engine.runner.lost = {"a"} if clock.now % 8 else set()
        assert [update.finish_reason for update in engine.step()] in ([], [None])
        engine.runner.epoch += 1


def test_a_lost_sequences_blocks_are_found_by_nobody():
    """Its keys and values lack an expert: b begins alike, and computes its prompt itself."""
    engine = make_engine()
    engine.submit(request("a", range(1, 11), max_tokens=1))
    engine.runner.lost = {"a"}
    engine.step()
    engine.submit(request("b", range(1, 11), max_tokens=1))
    engine.step()
    assert engine.runner.steps == [[("a", 10)], [("b", 10)]]


def test_a_sequence_that_gave_way_and_came_back_has_the_whole_recovery_time_again():
    """Three blocks of 4. b is lost, gives way, waits longer than the recovery time, and is lost again."""
    clock = Clock()
    engine = make_engine(num_blocks=3, enable_prefix_caching=False, clock=clock)
    engine.submit(request("a", [1, 2, 3], max_tokens=8))
    engine.submit(request("b", [11, 12, 13], max_tokens=4))
    engine.step()
    engine.runner.lost = {"b"}
    updates = []
    while len(engine.sequences) == 2:
        updates += engine.step()
        clock.now += 20.0 if len(engine.scheduler.waiting) else 0.5
    updates += engine.step()
    assert clock.now > 20.0
    assert [update.error for update in updates if update.error] == []
    engine.runner.lost, engine.runner.epoch = set(), 2
    assert run_to_end(engine)["b"] == ([15, 16, 17], "length")


def test_a_held_sequence_may_lose_its_blocks_to_others():
    """Three blocks of 4. Held b gives way to a, and is computed again when a is through."""
    engine = make_engine(num_blocks=3, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3], max_tokens=8))
    engine.submit(request("b", [11, 12, 13], max_tokens=4))
    engine.step()
    engine.runner.lost = {"b"}
    for _ in range(6):
        engine.step()
    engine.runner.lost = set()
    assert run_to_end(engine)["b"] == ([15, 16, 17], "length")
    assert engine.blocks.num_used == 0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    max_tokens=st.integers(1, 12),
    num_blocks=st.integers(8, 20),
    budget=st.integers(1, 30),
    max_num_seqs=st.integers(1, 8),
    prefix_caching=st.booleans(),
    losses=st.lists(st.sets(st.integers(0, 11), max_size=6), max_size=20),
    num_ahead=st.integers(0, 3),
)
def test_any_load_ends_with_the_right_tokens_and_no_block_lost(
    prompts, max_tokens, num_blocks, budget, max_num_seqs, prefix_caching, losses, num_ahead
):
    """Each step keeps its budget, no block is lost, none belongs to two sequences that do not begin alike, and every
    answer counts on from its prompt, whichever sequences lose their experts in which step."""
    engine = make_engine(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=prefix_caching,
        num_ahead=num_ahead,
    )
    for index, length in enumerate(prompts):
        engine.submit(request(str(index), range(100, 100 + length), max_tokens=max_tokens))
    answers = {str(index): [] for index in range(len(prompts))}
    while engine.has_work:
        engine.runner.lost = {str(index) for index in losses.pop()} if losses else set()
        engine.runner.epoch += 1
        for update in engine.step():
            answers[update.request_id] += update.token_ids
        held = [
            block
            for sequence in engine.sequences.values()
            for table in sequence.block_tables
            for block in table.held().tolist()
        ]
        assert len(set(held)) == engine.blocks.num_used
        if not prefix_caching:
            assert len(held) == len(set(held))
    assert all(sum(num_tokens for _, num_tokens in step) <= budget for step in engine.runner.steps)
    assert all(len(step) <= max_num_seqs for step in engine.runner.steps)
    for index, length in enumerate(prompts):
        assert answers[str(index)] == list(range(100 + length, 100 + length + max_tokens))
    assert engine.blocks.num_used == 0


def test_the_loop_reports_all_sequences_of_a_step_together_and_refusals_too():
    engine = make_engine(max_model_len=10)
    loop = EngineLoop(engine)
    loop.submit([request("a", [1], max_tokens=1), request("b", [2], max_tokens=1), request("c", [1] * 10)])
    loop.start()
    updates, received = [], 0
    while len(updates) < 3:
        received, news = loop.poll(timeout_s=10, received=received)
        updates += news
    loop.stop()
    ends = {update.request_id: (update.token_ids, update.finish_reason) for update in updates}
    assert ends == {"a": ((2,), "length"), "b": ((3,), "length"), "c": ((), "error")}
    assert engine.runner.steps == [[("a", 1), ("b", 1)]]


def test_the_loop_hands_on_what_ended_it():
    engine = make_engine()
    engine.runner.errors += [ValueError("a bug")] * 2  # at the request, and at a token that nobody asked for
    loop = EngineLoop(engine)
    loop.submit([request("a")])
    loop.start()
    with pytest.raises(ValueError, match="a bug"):
        loop.poll(timeout_s=10, received=0)


def test_a_message_that_got_lost_is_given_again_and_a_received_one_is_not():
    loop = EngineLoop(make_engine())
    loop.submit([request("a", [1], max_tokens=1)])
    loop.start()
    first = loop.poll(timeout_s=10, received=0)
    assert [update.token_ids for update in first[1]] == [(2,)]
    assert loop.poll(timeout_s=10, received=0) == first
    assert loop.poll(timeout_s=0, received=first[0]) == (first[0], [])
    loop.stop()


def test_an_abort_ends_a_clients_requests_of_these_names_alone():
    """The names are the clients' own: b's is the same as one of a's, and an attempt may have another id than a name."""
    loop = EngineLoop(make_engine())
    named = {"1#1": ("a", "x"), "2": ("a", "x"), "3": ("a", "y"), "4": ("b", "x")}
    loop.submit([replace(request(i, max_tokens=1), client=client, name=name) for i, (client, name) in named.items()])
    loop.abort("a", ["x", "none"])
    loop.start()
    updates, received = [], 0
    while len(updates) < 4:
        received, news = loop.poll(timeout_s=10, received=received)
        updates += news
    loop.stop()
    assert {u.request_id: u.finish_reason for u in updates} == {
        "1#1": "cancelled", "2": "cancelled", "3": "length", "4": "length",
    }  # fmt: skip
