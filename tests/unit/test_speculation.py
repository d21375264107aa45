"""Several tokens a step by drafts: which are tried, which are right, and that no answer shows how it was made."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from configs import config
from drafters import Always, Told, always
from engine_fakes import Clock, CountingRunner, DraftedRunner, block_manager, request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import ClusterConfig, EngineConfig
from cluster.engine.drafting import Acceptance, TokenHistory
from cluster.engine.engine import Engine
from cluster.engine.payoff import MARGIN, PLAIN_STEPS, RETRY_STEPS, TRIES, Payoff, best_lengths
from cluster.engine.prompt_lookup import PromptLookup
from cluster.engine.runner import right_tokens
from cluster.engine.speculation import SpeculatingRunner
from cluster.errors import InvalidRequest, SetupError
from cluster.metrics import EngineMetrics, new_registry
from cluster.model.penalties import PenaltyState

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def looked_up(ids, shortest, longest, num_tokens):
    """The definition, token by token."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for place in range(len(ids) - 1, length - 1, -1):
            if ids[place - length : place] == ids[-length:]:
                text = list(ids)
                for i in range(num_tokens):
                    text.append(text[place + i])
                return tuple(text[len(ids) :])
    return ()


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=14), known=st.integers(0, 14), shortest=st.integers(1, 3),
    more=st.integers(0, 2), num_tokens=st.integers(1, 6),
)  # fmt: skip
def test_a_draft_is_what_followed_the_longest_match_where_it_stood_last(ids, known, shortest, more, num_tokens):
    history = TokenHistory()
    history.extend(ids[:known])
    history.extend(ids)
    expected = looked_up(ids, shortest, shortest + more, num_tokens)
    assert history.continuation(shortest, shortest + more, num_tokens) == expected


def test_a_long_history_grows():
    history = TokenHistory()
    history.extend(list(range(1000)))
    history.extend([*range(1000), 5, 6])
    assert history.continuation(2, 4, 3) == (7, 8, 9)


def test_late_tokens_weigh_more_in_the_share_that_is_right():
    acceptance = Acceptance()
    assert acceptance.share(0.3) == pytest.approx(0.3)
    for _ in range(30):
        acceptance.observe(4, 4)
    assert acceptance.share(0.3) > 0.9
    for _ in range(8):
        acceptance.observe(0, 4)
    assert acceptance.share(0.3) < 0.45
    acceptance.fade(0.0)
    assert acceptance.share(0.3) == pytest.approx(0.3)


@settings(max_examples=100, deadline=None)
@given(
    chances=st.lists(st.tuples(st.integers(0, 3), st.floats(0.05, 0.95)), min_size=1, max_size=4),
    cost=st.floats(0.01, 2.0), room=st.integers(0, 12),
)  # fmt: skip
def test_no_other_lengths_bring_more_tokens_in_the_time(chances, cost, room):
    """Beside all that there are; up to the margin, below which a token is not worth its noise."""

    def rate(lengths):
        tokens = sum(1 + sum(share**n for n in range(1, k + 1)) for k, (_, share) in zip(lengths, chances, strict=True))
        return tokens / (1 + cost * sum(lengths))

    found = best_lengths(chances, cost, room)
    assert sum(found) <= room
    every = [k for k in product(*(range(most + 1) for most, _ in chances)) if sum(k) <= room]
    assert rate(found) * MARGIN >= max(map(rate, every)) - 1e-9
    assert rate(found) >= 1.0


def steps_of(payoff, num_steps, share, row_cost, num_sequences=1, most=4):
    """(steps with drafts, time of all, in steps without): drafts of which `share` is right, at a cost a row."""
    tried, total = 0, 0.0
    for _ in range(num_steps):
        lengths = payoff.lengths([(most, share)] * num_sequences, 1000)
        seconds = 1 + row_cost * sum(lengths)
        payoff.record(num_sequences, sum(lengths), seconds)
        tried += any(lengths)
        total += seconds
    return tried, total


def test_drafts_that_pay_are_tried_in_all_but_a_few_steps():
    tried, _ = steps_of(Payoff(), 1000, share=0.9, row_cost=0.2)
    assert 1000 - tried <= TRIES + 1 + 1000 // PLAIN_STEPS


@pytest.mark.parametrize(("share", "row_cost"), [(0.9, 2.0), (0.3, 0.5), (0.02, 0.2)])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_trying_what_does_not_pay_costs_a_bounded_share(share, row_cost, num_sequences):
    """The first tries, each number of rows once for warmth, and then one step in RETRY_STEPS."""
    tried, total = steps_of(Payoff(), 8_000, share, row_cost / num_sequences, num_sequences)
    assert tried <= 8_000 / RETRY_STEPS + TRIES + 5
    assert total <= 8_000 * (1 + 4 * row_cost / RETRY_STEPS) + 4 * row_cost * (TRIES + 5)


def test_drafts_that_came_to_pay_are_found_again():
    payoff = Payoff()
    steps_of(payoff, 1000, share=0.9, row_cost=2.0)
    tried, _ = steps_of(payoff, 5 * RETRY_STEPS, share=0.9, row_cost=0.1)
    assert tried > RETRY_STEPS


def test_the_first_time_of_a_number_of_rows_counts_for_nothing():
    """Its kernels may be made then."""
    payoff = Payoff()
    for seconds in (9.0, 1.0, 1.0, 1.0):
        payoff.record(1, 0, seconds)
    for seconds in (50.0, 1.5, 1.5, 1.5):
        payoff.record(1, 4, seconds)
    assert payoff.cost(1) == pytest.approx(0.125)


def sequence_of(prompt, drafting_room=4):
    engine = speculating_engine(CountingRunner())
    engine.submit(request("a", prompt, max_tokens=50))
    return engine.sequences["a"]


def test_a_lookup_learns_from_what_it_does_not_try():
    """1 2 3 stood before, followed by 4, then by 9."""
    lookup, sequence = PromptLookup(shortest=2, longest=3), sequence_of([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.offers([sequence], [4]) == [4]
    assert lookup.drafts([sequence], [0]) == [()]
    sequence.token_ids.append(4)
    assert lookup.offers([sequence], [4]) == [4]
    right = sequence.drafting.acceptance.share(lookup.prior)
    assert right > lookup.prior
    assert lookup.drafts([sequence], [2]) == [(5, 1)]
    sequence.token_ids.append(9)
    assert lookup.offers([sequence], [4]) == [0]
    assert sequence.drafting.acceptance.share(lookup.prior) == right, "the engine tells of what was tried"


@pytest.mark.parametrize(
    ("draft", "chosen", "expected"),
    [
        ((), [5], [5]),
        ((5, 6), [5, 6, 7], [5, 6, 7]),
        ((5, 6), [5, 8, 7], [5, 8]),
        ((5, 6), [4, 6, 7], [4]),
        ((5, 6), [5, ValueError(), 7], [5]),
    ],
)
def test_the_first_chosen_token_that_is_not_the_drafted_one_is_the_last(draft, chosen, expected):
    tokens = [token if isinstance(token, Exception) else (token, None) for token in chosen]
    assert right_tokens(draft, tokens) == ([(token, None) for token in expected], None)


def test_an_exception_at_the_first_token_is_the_sequences():
    error = ValueError()
    assert right_tokens((5,), [error, (6, None)]) == ([], error)


def test_penalties_ahead_are_those_of_the_tokens_appended():
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(9) for _ in range(6)]
        ahead = tuple(generator.randrange(9) for _ in range(3))
        state, appended = PenaltyState(), PenaltyState()
        state.extend(ids, 3, 9)
        appended.extend([*ids, *ahead], 3, 9)
        found, counts = state.ahead(ahead)
        assert found.tolist() == appended.ids.tolist()
        assert counts.tolist() == appended.counts.tolist()
        assert len(state.ids) == len(set(ids)), "it stays as it was"


def speculating_engine(runner, drafter=None, num_blocks=64, **limits):
    given = EngineConfig(block_size=4, **limits)
    metrics = EngineMetrics(new_registry(), "test")
    drafter = drafter or PromptLookup(shortest=1, longest=3)
    return Engine(
        SpeculatingRunner(runner, drafter, Always(), num_ahead=3, max_rows=given.max_num_batched_tokens),
        given, blocks=block_manager(num_blocks, given), eos_token_ids=(0,), max_model_len=1000, metrics=metrics,
        clock=Clock(),
    )  # fmt: skip


COUNTED = [([5], range(6, 30)), ([50], range(51, 80))]


@settings(max_examples=60, deadline=None)
@given(
    wrong=st.floats(0, 1), num_blocks=st.integers(5, 20), budget=st.integers(1, 12), stop=st.integers(6, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_answers_do_not_depend_on_drafts(wrong, num_blocks, budget, stop, seed):
    drafter = Told(COUNTED, wrong=wrong, vocab_size=80, seed=seed)
    runner = DraftedRunner()
    engine = speculating_engine(runner, drafter, num_blocks=num_blocks, max_num_batched_tokens=budget)
    engine.submit(request("a", [5], max_tokens=14, stop_token_ids=[stop]))
    engine.submit(request("b", [50], max_tokens=14))
    length = min(14, stop - 5)
    reason = "stop" if stop < 20 else "length"
    assert run_to_end(engine) == {"a": (list(range(6, 6 + length)), reason), "b": (list(range(51, 65)), "length")}
    assert engine.blocks.num_used == 0
    for step, drafts in zip(runner.steps, runner.drafts, strict=True):
        assert sum(n for _, n in step) + sum(map(len, drafts)) <= budget


def test_right_drafts_make_fewer_steps_and_are_counted():
    """The prompt has one token: 6 to 9 come with its step, then 10 to 13, then 14 and 15."""
    runner = DraftedRunner()
    engine = speculating_engine(runner, Told(COUNTED))
    engine.submit(request("a", [5], max_tokens=10))
    assert run_to_end(engine) == {"a": (list(range(6, 16)), "length")}
    assert [len(drafts[0]) for drafts in runner.drafts] == [3, 3, 1]
    stats = engine.stats()
    assert (stats.drafted_tokens, stats.accepted_tokens) == (7, 7)


def test_a_step_that_breaks_with_drafts_is_run_without():
    runner = DraftedRunner(breaks=True)
    engine = speculating_engine(runner, Told(COUNTED))
    engine.submit(request("a", [5], max_tokens=4))
    assert run_to_end(engine) == {"a": ([6, 7, 8, 9], "length")}


def test_a_drafter_that_breaks_ends_no_answer():
    class Broken(Told):
        def draft(self, sequence, length):
            raise RuntimeError("no draft")

    engine = speculating_engine(DraftedRunner(), Broken(COUNTED))
    engine.submit(request("a", [5], max_tokens=4))
    assert run_to_end(engine) == {"a": ([6, 7, 8, 9], "length")}


def test_a_lost_expert_of_a_draft_holds_nobody():
    runner = DraftedRunner(loses=True)
    engine = speculating_engine(runner, Told(COUNTED))
    engine.submit(request("a", [5], max_tokens=4))
    assert run_to_end(engine) == {"a": ([6, 7, 8, 9], "length")}
    assert runner.waits == 0


def test_a_lost_expert_of_its_own_holds_a_sequence_and_the_other_goes_on():
    runner = DraftedRunner()
    engine = speculating_engine(runner, Told(COUNTED))
    for name, prompt in (("a", [5]), ("b", [50])):
        engine.submit(request(name, prompt, max_tokens=9))
    engine.step()
    runner.lost = {"a"}
    while "b" in engine.sequences:
        engine.step()
    assert engine.sequences["a"].held
    runner.lost, runner.epoch = set(), 2
    assert run_to_end(engine)["a"][0][-1] == 14


def test_an_answer_goes_on_elsewhere_from_any_token():
    for num_given in range(9):
        engine = speculating_engine(DraftedRunner(), Told(COUNTED))
        asked = replace(request("a", [5], max_tokens=9), output_token_ids=tuple(range(6, 6 + num_given)))
        engine.submit(asked)
        assert run_to_end(engine) == {"a": (list(range(6 + num_given, 15)), "length")}


@pytest.mark.parametrize(
    ("given_config", "named"),
    [
        ({"method": "medusa"}, "speculative_config: method is 'medusa', one of ngram, draft_model"),
        ({}, "speculative_config: method is missing"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens is 0, at least 1"),
        ({"method": "ngram", "num_speculative_tokens": "4"}, "num_speculative_tokens is '4'"),
        ({"method": "ngram", "prompt_lookup_min": 5}, "prompt_lookup_min is 5, at most prompt_lookup_max (4)"),
        ({"method": "ngram", "tokens": 5}, "unknown key 'tokens'; known ones: method"),
        ({"method": "ngram", "num_speculative_tokens": 50}, "less than max_num_batched_tokens (50)"),
        ("ngram", "speculative_config is 'ngram', an object with names is needed"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(given_config, named):
    for make in (EngineConfig, lambda **values: ClusterConfig(model="/m", **values)):
        with pytest.raises(SetupError) as raised:
            make(speculative_config=given_config, max_num_batched_tokens=50)
        assert named in str(raised.value)
        assert "\n" not in str(raised.value)


def params(seed, **changes):
    values = {"temperature": 0.9, "top_p": 0.95, "seed": seed, "max_tokens": 24, "ignore_eos": True, **changes}
    return SamplingParams(**{"repetition_penalty": 1.0, **values})


PROMPTS = [[11, 12, 13, 11, 12], [40], [7, 8, 9, 7, 8, 9, 7], [3] * 30, [100, 101, 102], [5, 6, 5], [90, 91], [64]]
KINDS = [
    params(1, temperature=0),
    params(2),
    params(3, temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logprobs=2),
    params(4, temperature=0.7, top_k=20, repetition_penalty=1.1),
    params(5, temperature=1.5, logprobs=3, min_tokens=12, stop_token_ids=list(range(0, 200, 9)), ignore_eos=False),
    params(6, temperature=0, logit_bias={7: 3.0, 9: -100.0}, logprobs=1),
    params(7, temperature=1.0, min_p=0.05),
    params(8, temperature=0, max_tokens=1),
]


@pytest.fixture(scope="module")
def make_llm(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("model") / "moe"
    write_checkpoint(model_dir, config(num_experts=8, num_hidden_layers=2), seed=4)

    def make(model_dir=model_dir, **options):
        return LLM(
            model_dir, dtype="float32", kv_cache_bytes=4 << 20, **{"block_size": 4, "skip_tokenizer": True, **options}
        )

    return make


@pytest.fixture(scope="module")
def plain_outputs(make_llm):
    with make_llm() as llm:
        return llm.generate(PROMPTS, KINDS)


def check(outputs, expected):
    for output, other in zip(outputs, expected, strict=True):
        assert (output.token_ids, output.text, output.finish_reason) == (
            other.token_ids, other.text, other.finish_reason,
        )  # fmt: skip
        for entry, one in zip(output.logprobs, other.logprobs, strict=True):
            assert entry.token_id == one.token_id
            assert entry.logprob == pytest.approx(one.logprob, abs=1e-4)
            assert [token_id for token_id, _ in entry.top] == [token_id for token_id, _ in one.top]


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_every_kind_of_request_gets_the_tokens_that_it_gets_without_drafts(make_llm, plain_outputs, wrong):
    """Together, alone, and with too few blocks, so that some give way."""
    drafter = Told([(o.prompt_token_ids, o.token_ids) for o in plain_outputs], wrong=wrong, vocab_size=200)
    with make_llm(speculative_config=NGRAM) as llm:
        payoff = always(llm, drafter)
        check(llm.generate(PROMPTS, KINDS), plain_outputs)
        for place in (2, 4):
            check(llm.generate([PROMPTS[place]], [KINDS[place]]), [plain_outputs[place]])
        assert sum(payoff.tried) > 100
    with make_llm(speculative_config=NGRAM, max_num_batched_tokens=9, max_num_seqs=3) as llm:
        always(llm, drafter)
        check(llm.generate(PROMPTS, KINDS), plain_outputs)
        assert llm.engine.blocks.num_used == 0


def test_tokens_looked_up_give_the_same_and_are_right_where_a_text_repeats(make_llm):
    """A bias of 100 makes each answer one token again and again."""
    same = [params(i, temperature=0, logit_bias={20 + i: 100.0}, max_tokens=40) for i in range(3)]
    with make_llm(speculative_config=NGRAM) as llm:
        payoff = always(llm)
        outputs = llm.generate(PROMPTS[:3], same)
        assert [set(output.token_ids) for output in outputs] == [{20}, {21}, {22}]
        assert len(payoff.tried) < 20, "steps that bring three sequences 40 tokens each"


def test_a_structured_answer_is_made_a_token_a_step_beside_drafts(make_llm, demo_checkpoint):
    form = SamplingParams(temperature=0, max_tokens=12, structured_outputs={"regex": "(ab){3}"})
    with make_llm(demo_checkpoint, speculative_config=NGRAM, skip_tokenizer=False) as llm:
        payoff = always(llm, Told([([50, 51], range(9))]))
        [formed] = llm.generate([[50, 51]], [form])
        assert formed.text == "ababab"
        assert not sum(payoff.tried)


def test_sampled_tokens_follow_the_models_distribution(make_llm):
    """Of 1500 seeds: the first token, for which the likeliest is drafted, and the second where that was right.
    Chi-squared over bins that expect 5 and more, below the value that chance exceeds once in 10,000."""
    prompt, num = [11], 1500
    values = {"temperature": 0.4, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "ignore_eos": True}
    with make_llm(speculative_config=NGRAM, max_num_seqs=256) as llm:
        before, probs, likeliest = prompt, [], []
        for _ in range(2):
            probs.append((llm.logits(before)[-1].double() / 0.4).softmax(dim=-1))
            likeliest.append(int(probs[-1].argmax()))
            before = [*before, likeliest[-1]]
        payoff = always(llm, Told([(prompt, likeliest)]))
        outputs = llm.generate([prompt] * num, [SamplingParams(seed=i, max_tokens=2, **values) for i in range(num)])
        assert sum(payoff.tried) >= num
    check_distribution([output.token_ids[0] for output in outputs], probs[0])
    seconds = [output.token_ids[1] for output in outputs if output.token_ids[0] == likeliest[0]]
    assert len(seconds) > 60
    check_distribution(seconds, probs[1])


def check_distribution(tokens, probs):
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = probs * len(tokens)
    large = expected >= 5
    found = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    statistic = float(((found - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    degrees = len(found) - 1
    assert degrees >= 3
    spread = 2 / (9 * degrees)
    assert statistic < degrees * (1 - spread + 3.72 * spread**0.5) ** 3, "by Wilson and Hilferty"


def test_prompt_scores_are_those_without_drafts(make_llm):
    with make_llm() as llm, make_llm(speculative_config=NGRAM) as drafting:
        for one, other in zip(llm.prompt_logprobs(PROMPTS[:3]), drafting.prompt_logprobs(PROMPTS[:3]), strict=True):
            assert one.logprobs[1:] == pytest.approx(other.logprobs[1:], abs=1e-5)


def test_a_request_that_is_refused_is_refused_with_drafts_too(make_llm):
    with make_llm(speculative_config=NGRAM) as llm, pytest.raises(InvalidRequest):
        llm.generate([[1] * 5000], KINDS[0])
