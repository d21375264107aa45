"""Steps that bring a sequence several tokens, and steps that bring it hidden states.

CountingRunner with num_ahead 2 answers the prompt (…, 5) with 6, 7, 8 in the first step, 9, 10, 11 in the second.
"""

from dataclasses import replace

import pytest
import torch
from engine_fakes import Clock, CountingRunner, make_engine, request, run_to_end

from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.step import StepResult
from cluster.errors import DeadlineExceeded, InvalidRequest, ShardUnavailable
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
    assert (len(sequence.block_table), sequence.num_computed_tokens, sequence.token_ids[-1]) == (2, 5, 8)
    engine.step()
    assert (len(sequence.block_table), sequence.num_computed_tokens, sequence.token_ids[-1]) == (2, 8, 11)
    engine.step()
    assert (len(sequence.block_table), sequence.num_computed_tokens) == (3, 11)
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
    """A row's hidden state is (its token, its position), and its logits are twice that."""

    def run(self, batch):
        result = super().run(batch)
        wanted = {}
        for i, s in enumerate(batch.scheduled):
            first = s.sequence.num_computed_tokens
            if s.sequence.wants_hidden_states and i not in result.lost:
                rows = [(s.sequence.token_ids[p], p) for p in range(first, first + s.num_tokens)]
                wanted[i] = torch.tensor(rows, dtype=torch.bfloat16)
        return replace(result, hidden_states=wanted)

    def logits(self, hidden_states):
        return hidden_states * 2


def scoring_engine(num_blocks=64, **limits):
    return Engine(
        RowsRunner(), EngineConfig(block_size=4, **limits), num_blocks=num_blocks, eos_token_ids=(0,),
        max_model_len=1000, metrics=EngineMetrics(new_registry(), "test"), clock=Clock(),
    )  # fmt: skip


def expected_logits(prompt):
    return torch.tensor([(2.0 * token_id, 2.0 * position) for position, token_id in enumerate(prompt)])


def test_a_score_has_the_logits_of_every_position_and_leaves_the_others_updates():
    engine = scoring_engine(max_num_batched_tokens=4)
    engine.submit(request("a", [1], max_tokens=9))
    logits = engine.score(request("s", range(20, 30)))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected_logits(range(20, 30)))
    assert run_to_end(engine) == {"a": ([*range(2, 11)], "length")}
    assert engine.blocks.num_used == 0


def test_a_score_is_computed_in_full_though_its_beginning_is_cached_and_leaves_no_block_behind():
    engine = scoring_engine()
    engine.submit(request("a", range(20, 30), max_tokens=1))
    run_to_end(engine)
    assert torch.equal(engine.score(request("s", range(20, 30))), expected_logits(range(20, 30)))
    assert torch.equal(engine.score(request("t", range(50, 60))), expected_logits(range(50, 60)))
    engine.submit(request("b", range(50, 60), max_tokens=1))
    run_to_end(engine)
    assert [step[0][1] for step in engine.runner.steps] == [10, 10, 10, 10]


def test_a_score_that_gives_way_in_the_middle_begins_again():
    """Three blocks of 4: a grows into the second, and the score, that came later, has computed 8 of its 9 tokens."""
    engine = scoring_engine(num_blocks=3, max_num_batched_tokens=5, enable_prefix_caching=False)
    engine.submit(request("a", [1, 2, 3], max_tokens=4))
    engine.step()
    assert torch.equal(engine.score(request("s", range(20, 29))), expected_logits(range(20, 29)))
    assert [num_tokens for step in engine.runner.steps for name, num_tokens in step if name == "s"][:2] == [4, 4]
    assert sum(num_tokens for step in engine.runner.steps for name, num_tokens in step if name == "s") > 9
    assert run_to_end(engine)["a"][1] == "length"


def test_a_score_waits_for_a_lost_expert_and_then_raises():
    engine = scoring_engine()
    engine.runner.lost = {"s"}
    engine.runner.wait_for_news = lambda epoch, timeout_s: setattr(engine.clock, "now", engine.clock.now + 1.0)
    with pytest.raises(ShardUnavailable):
        engine.score(request("s", [1, 2]))
    assert engine.clock.now >= engine.runner.recovery_timeout_s
    assert not engine.has_work


def test_a_score_without_room_is_refused():
    engine = scoring_engine(num_blocks=2)
    with pytest.raises(InvalidRequest, match="token_ids has 9 tokens, the KV cache has room for 8"):
        engine.score(request("s", range(9)))
    assert not engine.has_work


def test_a_score_has_an_id_and_a_time_like_every_request():
    engine = scoring_engine()
    engine.submit(request("a", [1]))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.score(request("a", [1]))
    engine.clock.now = 5.0
    with pytest.raises(DeadlineExceeded):
        engine.score(request("s", [1], timeout_s=0.0))
    assert run_to_end(engine)["a"][1] == "length"
