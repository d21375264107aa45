"""Sequences at which an engine died have steps of their own, and hold nobody up (see CountingRunner for the tokens)."""

from dataclasses import replace

from engine_fakes import make_engine, request, run_to_end
from hypothesis import example, given, settings
from hypothesis import strategies as st


def suspect(request_id, prompt=(1,), num_alone_tokens=1, given=(), **params):
    return replace(
        request(request_id, prompt, **params),
        num_replays=1,
        num_alone_tokens=num_alone_tokens,
        output_token_ids=tuple(given),
    )


def names(engine):
    return ["".join(request_id for request_id, _ in step) for step in engine.runner.steps]


def test_a_suspect_is_computed_alone_until_its_first_token_and_then_with_the_others():
    engine = make_engine()
    engine.submit(request("a", [1], max_tokens=5))
    engine.submit(request("b", [1], max_tokens=5))
    engine.step()
    engine.submit(suspect("s", [1, 2], given=(3,), max_tokens=4))
    answers = run_to_end(engine)
    assert names(engine) == ["ab", "s", "abs", "abs", "ab", "ab"]
    assert answers["s"] == ([4, 5, 6], "length")


def test_two_suspects_are_computed_one_after_the_other_and_others_have_every_other_step():
    engine = make_engine()
    engine.submit(request("a", [1], max_tokens=4))
    engine.step()
    for name in "st":
        engine.submit(suspect(name, max_tokens=2))
    run_to_end(engine)
    assert names(engine) == ["a", "s", "as", "t", "at", "a"]


def test_a_suspects_prompt_in_chunks_is_alone_in_each_and_takes_no_more_than_every_other_step():
    engine = make_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1], max_tokens=4))
    engine.step()
    engine.submit(suspect("s", range(10), max_tokens=1))
    run_to_end(engine)
    assert names(engine) == ["a", "s", "a", "s", "a", "s", "a"]


def test_a_suspect_of_several_deaths_stays_alone_for_longer():
    engine = make_engine()
    engine.submit(suspect("s", num_alone_tokens=3, max_tokens=4))
    engine.submit(request("a", [1], max_tokens=4))
    run_to_end(engine)
    assert names(engine) == ["s", "a", "s", "a", "s", "sa", "a"]


def test_suspects_take_turns_with_one_another():
    engine = make_engine()
    for name in "stu":
        engine.submit(suspect(name, num_alone_tokens=2, max_tokens=2))
    run_to_end(engine)
    assert names(engine) == [*"stustu"]


def test_a_suspect_that_finds_no_room_holds_nobody_up():
    """Three blocks of 4: a holds two and grows into the third, so s (9 tokens) must wait for its end."""
    engine = make_engine(num_blocks=3, enable_prefix_caching=False)
    engine.submit(request("a", range(5), max_tokens=6))
    engine.step()
    engine.submit(suspect("s", range(8), max_tokens=1))
    run_to_end(engine)
    assert names(engine) == [*"aaaaaa", "s"]


def test_a_suspect_that_is_held_lets_the_others_go_on():
    engine = make_engine()
    engine.submit(suspect("s", [5], max_tokens=1))
    engine.submit(request("a", [1], max_tokens=4))
    engine.runner.lost = {"s"}
    for _ in range(4):
        engine.step()
    assert names(engine) == ["s", "a", "a", "a"]


# Once without an end: the seventh and the eighth do not fit together, and the eighth always had the turn.
@example(
    requests=[(17, 2), (17, 2), (9, 3), (3, 3), (20, 2), (8, 1), (16, 3), (20, 3)],
    num_blocks=8,
    budget=15,
    max_num_seqs=2,
)
@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=10),
    num_blocks=st.integers(8, 20),
    budget=st.integers(1, 30),
    max_num_seqs=st.integers(1, 8),
)
def test_any_mix_of_suspects_and_others_ends_with_the_right_tokens(requests, num_blocks, budget, max_num_seqs):
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
    for i, (length, num_alone) in enumerate(requests):
        engine.submit(suspect(f"r{i}", range(100 * i, 100 * i + length), num_alone, max_tokens=5))
    news = dict.fromkeys((f"r{i}" for i in range(len(requests))), 0)
    answers = {}
    for _ in range(1000):
        if not engine.has_work:
            break
        before = dict(news)
        num_steps = len(engine.runner.steps)
        for update in engine.step():
            news[update.request_id] += len(update.token_ids)
            answers.setdefault(update.request_id, []).extend(update.token_ids)
        for step in engine.runner.steps[num_steps:]:
            if any(before[name] < requests[int(name[1:])][1] for name, _ in step):
                assert len(step) == 1
    for i, (length, _) in enumerate(requests):
        last = 100 * i + length - 1
        assert answers[f"r{i}"] == list(range(last + 1, last + 6))
    assert engine.blocks.num_used == 0
