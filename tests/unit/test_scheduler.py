"""How a step's tokens are shared. Steps are the clock: what a step computes is known, what it takes is not."""

from dataclasses import replace

import pytest
from engine_fakes import make_engine, request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st


def step_of(engine, request_id):
    """The number of the step that brings a request its first token, 1 for the next one."""
    number = 0
    while True:
        number += 1
        if any(update.request_id == request_id and update.token_ids for update in engine.step()):
            return number


def first_step(engine, request_id):
    return next(i for i, step in enumerate(engine.runner.steps) if request_id in dict(step))


def test_a_short_prompt_has_its_first_token_in_the_next_step_beside_a_long_one():
    engine = make_engine(num_blocks=2000, max_model_len=5000, max_num_batched_tokens=256)
    engine.submit(request("long", range(10, 4010), max_tokens=1))
    engine.step()
    assert engine.runner.steps == [[("long", 256)]]
    engine.submit(request("short", range(5000, 5005), max_tokens=1))
    assert step_of(engine, "short") == 1
    assert dict(engine.runner.steps[-1]) == {"short": 5, "long": 251}
    assert run_to_end(engine)["long"] == ([4010], "length")
    assert len(engine.runner.steps) == 16  # as many as without the short one: (4000 + 5) / 256


def test_a_short_prompt_goes_before_long_ones_that_wait():
    """All places but one are free, three long prompts wait before the short one, and the cache holds two and a bit."""
    engine = make_engine(num_blocks=2010, max_model_len=5000, max_num_batched_tokens=256, max_num_seqs=8)
    for number in range(4):
        engine.submit(request(f"long-{number}", range(10, 4010), max_tokens=1))
    engine.step()
    engine.submit(request("short", range(5000, 5005), max_tokens=1))
    assert step_of(engine, "short") == 1


def test_decode_rows_come_before_prompts():
    """Three sequences decode and came last; the prompt that is older gets what they leave of the budget of 8."""
    engine = make_engine(num_blocks=200, max_num_batched_tokens=8)
    engine.submit(request("long", range(10, 110), max_tokens=1))
    engine.step()
    for name in "abc":
        engine.submit(request(name, [500], max_tokens=30))
    engine.step()
    engine.step()
    assert dict(engine.runner.steps[-1]) == {"a": 1, "b": 1, "c": 1, "long": 5}


def test_equally_long_prompts_are_computed_one_after_another():
    """Computed side by side both would come at the end: the first one keeps the whole budget."""
    engine = make_engine(num_blocks=200, max_num_batched_tokens=50)
    engine.submit(request("a", range(10, 110), max_tokens=1))
    engine.submit(request("b", range(110, 210), max_tokens=1))
    run_to_end(engine)
    assert engine.runner.steps == [[("a", 50)], [("a", 50)], [("b", 50)], [("b", 50)]]


@pytest.mark.parametrize("clients", [1, 5])
def test_endless_short_prompts_take_half_the_budget_of_a_long_one_at_most(clients):
    """Each step 40 prompts of 3 tokens arrive, three times what half of the budget of 64 can take. The long one has
    its turn at once, and then at least 32 of the 64 tokens: 1000 tokens need 32 steps at most.

    With a place for all, they decode one token each and end with it, so no decode rows take part."""
    engine = make_engine(
        num_blocks=10_000, max_model_len=2000, max_num_batched_tokens=64, max_num_seqs=5000, max_waiting=5000
    )
    engine.submit(request("long", range(10, 1010), max_tokens=1))
    number = 0
    for _ in range(100):
        for _ in range(40):
            number += 1
            short = request(f"short-{number}", [2000, 2001, 2000 + number], max_tokens=1)
            engine.submit(replace(short, client=f"client-{number % clients}"))
        if any(update.request_id == "long" for update in engine.step()):
            break
    assert 25 < len(engine.runner.steps) <= 32
    assert all(dict(made)["long"] >= 32 for made in engine.runner.steps[:-1])


@pytest.mark.parametrize("clients", [1, 5])
def test_a_long_prompt_that_waits_behind_another_has_its_turn_too(clients):
    """Two long prompts and an endless flow: the second one's turn comes when the first is through."""
    engine = make_engine(
        num_blocks=10_000, max_model_len=2000, max_num_batched_tokens=64, max_num_seqs=5000, max_waiting=5000
    )
    for name in ("first", "second"):
        engine.submit(replace(request(name, range(10, 1010), max_tokens=1), client=name))
    ends = {}
    for step in range(1, 200):
        for number in range(40 * step, 40 * step + 40):
            short = request(f"short-{number}", [2000, 2001, 2000 + number], max_tokens=1)
            engine.submit(replace(short, client=f"client-{number % clients}"))
        ends |= {update.request_id: step for update in engine.step() if update.request_id in ("first", "second")}
        if len(ends) == 2:
            break
    assert ends["first"] <= 32
    assert ends["second"] <= 64 + clients  # before its turn come one of each other client's


def test_short_prompts_do_not_keep_a_long_one_out_of_the_cache():
    """20 blocks of 4. The running one has 10 and stays; the long one needs 15, so it waits, and so do the short ones
    that came later: each would take blocks that it waits for."""
    engine = make_engine(num_blocks=20, max_num_batched_tokens=60, enable_prefix_caching=False)
    engine.submit(request("running", range(10, 38), max_tokens=12))
    engine.step()
    engine.submit(request("long", range(100, 157), max_tokens=1))
    for _ in range(3):
        engine.step()
    for number in range(30):
        engine.submit(request(f"short-{number}", [500 + number], max_tokens=8))
    run_to_end(engine)
    assert first_step(engine, "long") <= min(first_step(engine, f"short-{number}") for number in range(30))


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    num_blocks=st.integers(18, 60),
    prefix_caching=st.booleans(),
)
def test_a_step_is_full_while_prompts_wait_that_fit(prompts, budget, num_blocks, prefix_caching):
    """No throughput is given away: without preemptions, a step computes less than the budget only if nothing more can
    begin. Every answer is right, and no block is lost."""
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=budget, enable_prefix_caching=prefix_caching)
    for number, length in enumerate(prompts):
        engine.submit(request(str(number), range(1000 * number + 1, 1000 * number + length + 1), max_tokens=3))
    answers = {}
    while engine.has_work:
        before = len(engine.scheduler.waiting)
        for update in engine.step():
            answers.setdefault(update.request_id, []).extend(update.token_ids)
        made = engine.runner.steps[-1]
        assert sum(num_tokens for _, num_tokens in made) <= budget
        if num_blocks >= sum(-(-(length + 3) // 4) for length in prompts) and before > len(made):
            assert sum(num_tokens for _, num_tokens in made) == budget
    for number, length in enumerate(prompts):
        assert answers[str(number)] == [1000 * number + length + i for i in (1, 2, 3)]
    assert engine.blocks.num_used == 0


def test_a_prompt_that_begins_alike_leaves_its_saved_tokens_to_the_next():
    """Budget 20: each of three prompts of 18 has 16 tokens in the cache, so all three fit one step with 2 each."""
    engine = make_engine(num_blocks=100, max_num_batched_tokens=20)
    engine.submit(request("first", range(1, 19), max_tokens=1))
    run_to_end(engine)
    for number in range(3):
        engine.submit(request(f"next-{number}", [*range(1, 17), 50 + number, 60], max_tokens=1))
    engine.step()
    assert engine.runner.steps[-1] == [("next-0", 2), ("next-1", 2), ("next-2", 2)]


def test_what_lost_its_blocks_has_its_turn_before_those_that_came_later():
    """Four blocks of 4. a and b decode until the blocks run out; b gives way and comes back before c."""
    engine = make_engine(num_blocks=4, max_num_seqs=2, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3, 4, 5, 6], max_tokens=6))
    engine.submit(request("b", [11, 12, 13, 14, 15, 16], max_tokens=6))
    engine.submit(request("c", [21], max_tokens=2))
    answers = run_to_end(engine)
    assert answers == {
        "a": ([7, 8, 9, 10, 11, 12], "length"), "b": ([17, 18, 19, 20, 21, 22], "length"), "c": ([22, 23], "length"),
    }  # fmt: skip
    steps = [[name for name, _ in step] for step in engine.runner.steps]
    gone = next(i for i, names in enumerate(steps) if names == ["a"])
    back = next(i for i, names in enumerate(steps) if i > gone and "b" in names)
    assert first_step(engine, "c") >= back
