"""The sampler against naive definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels.sampling.random_numbers import uniform, uniforms
from cluster.kernels.sampling.reference import penalize
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import SamplingRow, rule_of, sample
from cluster.types import SAMPLING_DEFAULTS, SamplingParams


def row(token_ids=(1,), num_prompt_tokens=1, banned=(), **params):
    return SamplingRow(
        token_ids=list(token_ids),
        num_prompt_tokens=num_prompt_tokens,
        params=SamplingParams(**params).with_defaults(SAMPLING_DEFAULTS),
        penalties=PenaltyState(),
        banned_token_ids=tuple(banned),
    )


def apply_penalties(logits, row):
    penalize(logits, rule_of(row, len(logits)))


def naive_choice(logits, temperature, top_k, top_p, min_p, number):
    """Sorts, cuts and adds up in plain Python. A row without top_k and top_p is drawn in the order of the ids."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    order = list(range(len(logits)))
    top_k = 0 if top_k >= len(logits) else top_k
    if top_k or top_p < 1:
        order.sort(key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    probs = {i: weights[i] / total for i in order}
    kept, before = [], 0.0
    for i in order:
        if before < top_p:
            kept.append(i)
        before += probs[i]
    best = max(probs[i] for i in kept)
    kept = [i for i in kept if probs[i] >= min_p * best]
    mass, target = 0.0, number * sum(probs[i] for i in kept)
    for i in kept:
        mass += probs[i]
        if mass > target:
            return i
    return kept[-1]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 3, 20, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_a_draw_is_the_naive_one(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2
    expected = naive_choice(logits[0].tolist(), temperature, top_k, top_p, min_p, uniform(seed, 3))
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    [(token_id, _)] = sample(logits, [row((1, 2, 3), **params)])
    assert token_id == expected


def test_greedy_takes_the_best():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [row(temperature=0)]) == [(1, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [9, 384, 1000])
def test_greedy_takes_the_best_in_every_dtype(dtype, vocab_size):
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)).to(dtype)
    chosen = [token_id for token_id, _ in sample(logits, [row(temperature=0)] * 5)]
    assert [logits[i, token_id].item() for i, token_id in enumerate(chosen)] == logits.amax(dim=1).tolist()


def test_a_row_samples_the_same_whatever_the_others_are():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    mine = row((4, 5), temperature=1.2, seed=11, top_p=0.95)
    alone = sample(logits[:1].clone(), [mine])
    others = [row(temperature=0.7, seed=i, top_k=i) for i in range(7)]
    assert sample(logits.clone(), [mine, *others])[0] == alone[0]


def test_numbers_are_even_and_differ_by_seed_and_position():
    numbers = [uniform(seed, position) for seed in range(30) for position in range(30)]
    assert len(set(numbers)) == 900
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 900 - 0.5) < 0.05  # five standard deviations of the mean


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=20),
)
def test_numbers_of_many_rows_are_those_of_numpy(pairs):
    assert uniforms(*zip(*pairs, strict=True)).tolist() == [uniform(seed, position) for seed, position in pairs]


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
    token_ids = [3, 4, 4, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([token_ids]), logits.clone())
    got = logits.clone()
    apply_penalties(got[0], row(token_ids, 2, temperature=0, repetition_penalty=1.7))
    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_count_the_output_only():
    """Prompt (5), output (6, 6, 7): token 6 loses 0.5 + 2 × 0.25, token 7 loses 0.5 + 0.25, token 5 nothing."""
    logits = torch.zeros(1, 9)
    apply_penalties(logits[0], row([5, 6, 6, 7], 1, temperature=0, presence_penalty=0.5, frequency_penalty=0.25))
    assert logits[0, [5, 6, 7]].tolist() == [0.0, -1.0, -0.75]


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 30), max_size=80), num_prompt=st.integers(0, 40), steps=st.lists(st.integers(1, 30))
)
def test_tokens_are_counted_however_the_sequence_grows(tokens, num_prompt, steps):
    state, stop = PenaltyState(), 0
    for step in [*steps, len(tokens)]:
        stop = min(stop + step, len(tokens))
        state.extend(tokens[:stop], num_prompt, 31)
    expected = {token: tokens[num_prompt:].count(token) for token in tokens}
    assert dict(zip(state.ids.tolist(), state.counts.tolist(), strict=True)) == expected


def test_a_token_that_the_vocabulary_lacks_is_refused():
    for token in (9, -1):
        with pytest.raises(IndexError, match="the vocabulary, which ends at 8"):
            PenaltyState().extend([3, token], 1, 9)


def test_penalties_follow_a_growing_sequence():
    kept = row([5], 1, temperature=0, frequency_penalty=1.0)
    apply_penalties(torch.zeros(9), kept)
    kept.token_ids.append(6)
    kept.token_ids.append(6)
    logits = torch.zeros(1, 9)
    apply_penalties(logits[0], kept)
    assert logits[0, [5, 6]].tolist() == [0.0, -2.0]


def test_banned_tokens_are_not_chosen():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [row(temperature=0, banned=[1])])[0][0] == 2


def test_logprobs_are_the_models_own_before_temperature_and_penalties():
    """Logits ln 1, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8, whatever is done to the logits afterwards."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    [(token_id, logprobs)] = sample(
        logits, [row([2], 1, temperature=0, repetition_penalty=100.0, logprobs=2, banned=[2])]
    )
    assert token_id == 1
    assert logprobs.logprob == pytest.approx(math.log(2 / 8))
    assert [token for token, _ in logprobs.top] == [2, 1]
    assert [value for _, value in logprobs.top] == pytest.approx([math.log(5 / 8), math.log(2 / 8)])


@pytest.mark.parametrize(("temperature", "penalty"), [(1e-5, 1.0), (1.0, 1e-300), (1e-5, 1e-45), (100.0, 1e-300)])
def test_a_draw_has_no_infinity_less_another(temperature, penalty):
    """The prompt's tokens 1 and 2 have the largest logits, which the penalty makes infinite: one of them is drawn.
    The difference of infinities is NaN, and a draw of NaN was the vocabulary's last token."""
    logits = torch.tensor([[1.0, 1e30, 1e30, -1.0, 2.0]])
    [(token_id, _)] = sample(
        logits, [row([1, 2], 2, banned=[0], temperature=temperature, repetition_penalty=penalty, seed=3)]
    )
    assert token_id in (1, 2)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.8]),
    bias=st.dictionaries(st.integers(0, 29), st.floats(-100, 100), min_size=1, max_size=5),
)
def test_a_biased_row_chooses_as_one_with_those_logits_and_shows_the_models_own_logprobs(seed, temperature, bias):
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    changed = logits.clone()
    for token_id, value in bias.items():
        changed[1, token_id] += value
    plain = row(temperature=temperature, seed=seed % 1000)
    biased = row(temperature=temperature, seed=seed % 1000, logit_bias=bias, logprobs=3)
    first, second = sample(logits, [plain, biased])
    assert first == sample(logits, [plain, plain])[0]
    assert second[0] == sample(changed, [plain, plain])[1][0]
    probs = logits[1].log_softmax(-1)
    assert math.isclose(second[1].logprob, float(probs[second[0]]), abs_tol=1e-5)
    values, ids = probs.topk(3)
    assert [token_id for token_id, _ in second[1].top] == ids.tolist()
    assert torch.allclose(torch.tensor([value for _, value in second[1].top]), values, atol=1e-5)
