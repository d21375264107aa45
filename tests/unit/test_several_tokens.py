"""Steps that bring a sequence several tokens, and steps that bring it hidden states.

CountingRunner with num_ahead 2 answers the prompt (…, 5) with 6, 7, 8 in the first step, 9, 10, 11 in the second.
"""

from dataclasses import replace

import pytest
import torch
from engine_fakes import Clock, CountingRunner, block_manager, make_engine, request, run_to_end

from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.step import StepResult
from cluster.errors import DeadlineExceeded, InvalidRequest, ShardUnavailable, Unavailable
from cluster.metrics import EngineMetrics, new_registry
from cluster.serving.text.answer import Answer
from cluster.types import Logprobs


class EagerRunner(CountingRunner):
    """Brings three tokens with their log-probabilities (−token), though a sequence has room for fewer."""

    def run(self, batch):
        self.steps.append([(s.sequence.request_id, s.num_tokens) for s in batch.scheduled])
        lasts = [s.sequence.token_ids[-1] for s in batch.scheduled]
        return StepResult([[(last + n, Logprobs(last + n, -float(last + n))) for n in (1, 2, 3)] for last in lasts])


def eager_engine():
    engine = make_engine()
    engine.runner = EagerRunner(num_ahead=2)
    return engine


def tokens_of_steps(engine):
    """The token ids of each update of a lone request."""
    updates = []
    while engine.has_work:
        updates += engine.step()
    return [update.token_ids for update in updates], updates[-1].finish_reason


def test_every_step_brings_as_many_tokens_as_fit_max_tokens():
    engine = make_engine(num_ahead=2)
    engine.submit(request("a", [5], max_tokens=7))
    assert tokens_of_steps(engine) == ([(6, 7, 8), (9, 10, 11), (12,)], "length")
    assert engine.runner.steps == [[("a", 1)]] * 3
    assert engine.num_generated_tokens == 7
    assert engine.blocks.num_used == 0


def test_a_stop_token_in_the_middle_ends_the_answer_there():
    engine = make_engine(num_ahead=2)
    engine.submit(request("a", [5], max_tokens=9, stop_token_ids=[7]))
    assert tokens_of_steps(engine) == ([(6, 7)], "stop")


def test_a_stop_token_before_min_tokens_does_not_end_the_answer():
    """7 is the second token of four at least; 10 is the fifth."""
    engine = make_engine(num_ahead=2)
    engine.submit(request("a", [5], max_tokens=9, min_tokens=4, stop_token_ids=[7, 10]))
    assert tokens_of_steps(engine) == ([(6, 7, 8), (9, 10)], "stop")


def test_what_a_runner_brings_beyond_max_tokens_is_cut_with_its_log_probabilities():
    engine = eager_engine()
    engine.submit(request("a", [5], max_tokens=2, logprobs=0))
    [update] = engine.step()
    assert (update.token_ids, update.finish_reason) == ((6, 7), "length")
    assert [entry.logprob for entry in update.logprobs] == [-6.0, -7.0]


def test_blocks_hold_the_tokens_ahead_and_full_ones_are_found_by_others():
    """Blocks of 4: a prompt of 3 with two tokens ahead needs 5 places, two blocks. The first step computes the prompt,
    6 and 7: of 1 to 7 the first block is full. The next one needs places for 8, 9 and 10, a third block."""
    engine = make_engine(num_ahead=2)
    engine.submit(request("a", [3, 4, 5], max_tokens=60))
    engine.step()
    [sequence] = engine.sequences.values()
    assert (len(sequence.block_tables[0]), sequence.num_computed_tokens, sequence.token_ids[-1]) == (2, 5, 8)
    engine.step()
    assert (len(sequence.block_tables[0]), sequence.num_computed_tokens, sequence.token_ids[-1]) == (2, 8, 11)
    engine.step()
    assert (len(sequence.block_tables[0]), sequence.num_computed_tokens) == (3, 11)
    engine.submit(request("b", [3, 4, 5, 6, 7, 8, 9, 10, 99], max_tokens=1))
    engine.step()
    assert dict(engine.runner.steps[-1]) == {"a": 1, "b": 1}


def test_a_sequence_that_fills_the_cache_needs_no_place_beyond_it():
    """Two blocks of 4 for a prompt of 6 and two tokens: places ahead of max_tokens would be a third block."""
    engine = make_engine(num_blocks=2, num_ahead=2)
    engine.submit(request("a", range(6), max_tokens=2))
    assert run_to_end(engine) == {"a": ([6, 7], "length")}
    assert len(engine.runner.steps) == 1


def test_a_sequence_that_gave_way_goes_on_with_its_next_token():
    """Four blocks of 4; a and b both grow into a third one, so b gives way and is computed again."""
    engine = make_engine(num_blocks=4, num_ahead=2, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3], max_tokens=9))
    engine.submit(request("b", [11, 12, 13], max_tokens=9))
    answers = run_to_end(engine)
    assert answers == {"a": (list(range(4, 13)), "length"), "b": (list(range(14, 23)), "length")}
    assert max(num_tokens for step in engine.runner.steps for name, num_tokens in step if name == "b") > 3
    assert engine.blocks.num_used == 0


def test_an_answer_goes_on_elsewhere_from_any_of_a_steps_tokens():
    """A replica hands on what it has; the next engine's first update brings the token after it."""
    whole = list(range(6, 15))
    for num_given in range(len(whole)):
        engine = make_engine(num_ahead=2)
        engine.submit(replace(request("a", [5], max_tokens=9), output_token_ids=tuple(whole[:num_given])))
        assert run_to_end(engine) == {"a": (whole[num_given:], "length")}


def test_the_record_has_each_step_once_and_a_suspect_stays_alone_for_its_tokens():
    """Four tokens alone are two steps of three."""
    recorded = []
    engine = make_engine(num_ahead=2)
    engine.on_step = lambda ids: recorded.append("".join(ids))
    engine.submit(replace(request("s", [5], max_tokens=9), num_replays=1, num_alone_tokens=4))
    engine.submit(request("a", [5], max_tokens=9))
    run_to_end(engine)
    assert recorded == ["s", "a", "s", "sa", "a"]


def test_a_stop_string_that_ends_in_the_middle_of_an_update_cuts_its_tokens():
    """Tokens are letters: the prompt ends with a, so the answer is bcd, efg; "de" is complete with e."""

    class Letters:
        def token_bytes(self, token_id):
            return bytes([token_id])

    asked = request("a", [ord("a")], max_tokens=9, stop=["de"], logprobs=0)
    engine = eager_engine()
    engine.submit(asked)
    answer = Answer(Letters(), asked.params, ())
    deltas = [answer.add(update) for _ in range(2) for update in engine.step()]
    assert [(delta.text, bytes(delta.token_ids), len(delta.logprobs), delta.finish_reason) for delta in deltas] == [
        ("bc", b"bcd", 3, None), ("", b"e", 1, "stop"),
    ]  # fmt: skip


def test_sequences_of_different_salts_share_no_block():
    """As an adapter's keys and values are not those of another one."""
    engine = make_engine()
    for name, salt in (("a", b""), ("b", b"adapter"), ("c", b"adapter"), ("d", b"")):
        engine.submit(request(name, range(1, 10), max_tokens=1))
        engine.sequences[name].block_salt = salt
        run_to_end(engine)
    assert [step[0][1] for step in engine.runner.steps] == [9, 9, 1, 1]


class RowsRunner(CountingRunner):
    """A row's hidden state is (its token, its position)."""

    def run(self, batch):
        result = super().run(batch)
        parts = {}
        for i, s in enumerate(batch.scheduled):
            first = s.sequence.num_computed_tokens
            if not s.sequence.wants_tokens and i not in result.lost:
                rows = [(s.sequence.token_ids[p], p) for p in range(first, first + s.num_tokens)]
                parts[i] = torch.tensor(rows, dtype=torch.float32)
        return replace(result, parts=parts)


def rows_engine(num_blocks=64, **limits):
    config = EngineConfig(block_size=4, **limits)
    return Engine(
        RowsRunner(), config, blocks=block_manager(num_blocks, config), eos_token_ids=(0,),
        max_model_len=1000, metrics=EngineMetrics(new_registry(), "test"), clock=Clock(),
    )  # fmt: skip


def ask_rows(engine, request_id, prompt, wants="hidden_states", **options):
    engine.submit(replace(request(request_id, prompt, **options), wants=wants))


def results(engine):
    """The last update of each request."""
    ends = {}
    while engine.has_work:
        ends |= {update.request_id: update for update in engine.step()}
    return ends


def expected_rows(prompt):
    return [[float(token_id), float(position)] for position, token_id in enumerate(prompt)]


def test_rows_come_once_in_one_update_and_the_others_go_on_beside_them():
    engine = rows_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1], max_tokens=9))
    ask_rows(engine, "s", range(20, 30))
    updates = []
    while engine.has_work:
        updates += engine.step()
    [update] = [update for update in updates if update.request_id == "s"]
    assert update.numbers.array().tolist() == expected_rows(range(20, 30))
    assert (update.finish_reason, update.token_ids) == ("stop", ())
    assert [token for update in updates for token in update.token_ids] == [*range(2, 11)]
    assert engine.blocks.num_used == 0


def test_the_mean_is_that_of_all_chunks():
    engine = rows_engine(max_num_batched_tokens=4)
    ask_rows(engine, "s", range(20, 30), wants="mean_hidden_state")
    engine.runner.run, run = lambda batch: summed(run(batch)), engine.runner.run
    assert results(engine)["s"].numbers.array().tolist() == [24.5, 4.5]


def summed(result):
    return replace(result, parts={i: rows.sum(dim=0) for i, rows in result.parts.items()})


def test_rows_are_computed_in_full_though_their_beginning_is_cached_and_leave_no_block_behind():
    engine = rows_engine()
    engine.submit(request("a", range(20, 30), max_tokens=1))
    run_to_end(engine)
    for name, prompt in (("s", range(20, 30)), ("t", range(50, 60))):
        ask_rows(engine, name, prompt)
        assert results(engine)[name].numbers.array().tolist() == expected_rows(prompt)
    engine.submit(request("b", range(50, 60), max_tokens=1))
    run_to_end(engine)
    assert [step[0][1] for step in engine.runner.steps] == [10, 10, 10, 10]


def test_a_last_row_needs_no_row_that_is_cached_and_leaves_blocks_to_find():
    engine = rows_engine()
    for name in ("s", "t"):
        ask_rows(engine, name, range(20, 30), wants="last_hidden_state")
        results(engine)
    engine.submit(request("a", range(20, 30), max_tokens=1))
    run_to_end(engine)
    assert [step[0][1] for step in engine.runner.steps] == [10, 2, 2]


def test_rows_of_a_sequence_that_gives_way_in_the_middle_begin_again():
    """Three blocks of 4: a grows into the second, and the other, that came later, has computed 8 of its 9 tokens."""
    engine = rows_engine(num_blocks=3, max_num_batched_tokens=5, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3], max_tokens=4))
    engine.step()
    ask_rows(engine, "s", range(20, 29))
    ends = results(engine)
    assert ends["s"].numbers.array().tolist() == expected_rows(range(20, 29))
    assert [num_tokens for step in engine.runner.steps for name, num_tokens in step if name == "s"][:2] == [4, 4]
    assert sum(num_tokens for step in engine.runner.steps for name, num_tokens in step if name == "s") > 9
    assert ends["a"].finish_reason == "length"


def test_a_result_waits_for_a_lost_expert_and_then_fails():
    engine = rows_engine()
    engine.runner.lost = {"s"}
    engine.runner.wait_for_news = lambda epoch, timeout_s: setattr(engine.clock, "now", engine.clock.now + 1.0)
    ask_rows(engine, "s", [1, 2])
    assert isinstance(results(engine)["s"].error, ShardUnavailable)
    assert engine.clock.now >= engine.runner.recovery_timeout_s
    assert not engine.has_work


def test_a_result_needs_room_for_its_prompt_and_no_more():
    engine = rows_engine(num_blocks=2)
    ask_rows(engine, "s", range(8))
    assert len(results(engine)["s"].numbers.array()) == 8
    with pytest.raises(InvalidRequest, match="the prompt has 9 tokens, the KV cache has room for 8"):
        ask_rows(engine, "s", range(9))
    with pytest.raises(InvalidRequest, match="the prompt has 1001 tokens, the context has 1000"):
        ask_rows(rows_engine(num_blocks=1000), "s", range(1001))
    assert not engine.has_work


def test_a_result_that_only_a_newer_version_knows_is_for_another_replica():
    engine = rows_engine()
    with pytest.raises(Unavailable, match="wants 'a_vision', which its attention replica's older version"):
        ask_rows(engine, "s", [1], wants="a_vision")
    assert not engine.has_work


def test_a_result_that_an_engine_may_have_died_of_is_computed_alone_in_each_of_its_chunks():
    engine = rows_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1], max_tokens=4))
    engine.step()
    engine.submit(replace(request("s", range(20, 30)), wants="hidden_states", num_replays=1, num_alone_tokens=1))
    ends = results(engine)
    assert ends["s"].numbers.array().tolist() == expected_rows(range(20, 30))
    assert [[name for name, _ in step] for step in engine.runner.steps] == [["a"], ["s"]] * 3 + [["a"]]


def test_a_result_has_an_id_and_a_time_like_every_request_and_can_be_cancelled():
    engine = rows_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1]))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        ask_rows(engine, "a", [1])
    ask_rows(engine, "late", range(20, 30), timeout_s=1.0)
    ask_rows(engine, "unwanted", range(20, 30))
    engine.step()
    engine.clock.now = 5.0
    engine.cancel("unwanted")
    ends = results(engine)
    assert isinstance(ends["late"].error, DeadlineExceeded)
    assert "of its 10 tokens" in str(ends["late"].error)
    assert (ends["unwanted"].finish_reason, ends["unwanted"].numbers) == ("cancelled", None)
    assert ends["a"].finish_reason == "length"
    assert engine.blocks.num_used == 0
