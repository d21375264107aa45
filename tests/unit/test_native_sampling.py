"""The native sampler beside the definition, every variant of this machine."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant
from sampling_tools import VOCAB_SIZES, check, random_logits, random_rule

from cluster.kernels.native.library import DTYPES, Native, variants
from cluster.kernels.sampling.native import choose_natively, pack
from cluster.kernels.sampling.random_numbers import uniform
from cluster.kernels.sampling.rule import Rule

VOCAB_SIZE = 151936


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32), num_rows=st.integers(1, 9), vocab_size=st.sampled_from(VOCAB_SIZES),
    padding=st.integers(0, 3), threads=st.integers(1, 3),
)  # fmt: skip
def test_rows_are_chosen_as_they_are_defined(
    native: Native, dtype: torch.dtype, seed: int, num_rows: int, vocab_size: int, padding: int, threads: int
) -> None:
    """Each row ends before numbers that would win, and begins wherever it does."""
    random = np.random.default_rng(seed)
    memory = torch.full((num_rows, vocab_size + padding), torch.inf).to(dtype)
    logits = memory[:, :vocab_size]
    logits.copy_(random_logits(random, num_rows, vocab_size))
    rules = [random_rule(random, vocab_size) for _ in range(num_rows)]
    check(choose_natively(native, logits, rules, threads), logits, rules)


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_rows_of_a_whole_vocabulary_are_chosen_as_they_are_defined(
    native: Native, dtype: torch.dtype, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random_logits(random, 8, VOCAB_SIZE).to(dtype)
    rules = [random_rule(random, VOCAB_SIZE)._replace(num_top=int(random.integers(-1, 21))) for _ in range(8)]
    check(choose_natively(native, logits, rules, 2), logits, rules)


@each_variant
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), vocab_size=st.sampled_from(VOCAB_SIZES))
@example(seed=1_022_210_948, vocab_size=7)  # a row whose allowed tokens have -inf, all of them: NaN equals NaN here
def test_a_row_is_chosen_alike_in_every_batch(native: Native, seed: int, vocab_size: int) -> None:
    random = np.random.default_rng(seed)
    logits = random_logits(random, 7, vocab_size)
    rules = [random_rule(random, vocab_size)._replace(num_top=2) for _ in range(7)]
    whole = choose_natively(native, logits, rules, 3)
    for i, rule in enumerate(rules):
        alone = choose_natively(native, logits[i : i + 1], [rule], 1)
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            np.testing.assert_equal(getattr(alone, name)[0], getattr(whole, name)[i])


def test_all_variants_draw_the_same_tokens() -> None:
    """Of 200 rows with settings of every kind; a sum's last bits would have to decide for two to differ."""
    random = np.random.default_rng(3)
    logits = torch.from_numpy(random.normal(0, 3, (200, 5000)).astype(np.float32)).bfloat16()
    rules = [
        Rule(temperature=1.0, top_k=i % 3 * 40, top_p=(1.0, 0.95, 0.5)[i % 5 % 3], seed=i, position=i)
        for i in range(200)
    ]
    drawn = [choose_natively(native, logits, rules, 2).token_ids for native in variants().values()]
    assert all(tokens == drawn[0] for tokens in drawn)
    assert not drawn or len(set(drawn[0])) > 50


@each_variant
@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), max_size=9))
def test_numbers_are_those_of_numpy(native: Native, pairs: list[tuple[int, int]]) -> None:
    seeds, positions = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    numbers, check_guard = bounded((len(pairs),), torch.float64)
    native.uniform_numbers(seeds.data_ptr(), positions.data_ptr(), numbers.data_ptr(), len(pairs))
    assert numbers.tolist() == [uniform(seed, position) for seed, position in pairs]
    check_guard()


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), vocab_size=st.sampled_from(VOCAB_SIZES), stray=st.booleans())
def test_nothing_beside_its_memory_is_written(
    native: Native, dtype: torch.dtype, seed: int, vocab_size: int, stray: bool
) -> None:
    """Nor for an id that the vocabulary does not have, which the caller should have refused."""
    random = np.random.default_rng(seed)
    rules = [random_rule(random, vocab_size) for _ in range(5)]
    if stray:
        ids = np.array([vocab_size, -1, 2**31 - 1, -(2**31)], dtype=np.int32)
        rules[0] = rules[0]._replace(ids=ids, counts=ids, banned=ids)
    num_top = min(vocab_size, max(0, *(rule.num_top for rule in rules)))
    packed = pack(rules)
    scratch_bytes = native.choose_tokens_scratch(vocab_size, packed.most_changes)
    parts = [
        bounded(shape, kind)
        for shape, kind in (
            ((5, vocab_size), dtype), ((5,), torch.int64), ((5,), torch.float32), ((5, num_top), torch.int32),
            ((5, num_top), torch.float32), ((2 * scratch_bytes,), torch.uint8),
        )
    ]  # fmt: skip
    logits, tokens, logprobs, top_ids, top_logprobs, scratch = (memory for memory, _ in parts)
    logits.copy_(random_logits(random, 5, vocab_size))
    native.choose_tokens(
        DTYPES[dtype], logits.data_ptr(), vocab_size, 5, vocab_size, packed.rules.data_ptr(), packed.ids.data_ptr(),
        packed.counts.data_ptr(), packed.masks.data_ptr(), packed.masks.shape[1], tokens.data_ptr(),
        logprobs.data_ptr(), num_top, top_ids.data_ptr(), top_logprobs.data_ptr(), packed.most_changes,
        scratch.data_ptr(), 2,
    )  # fmt: skip
    for _, check_guard in parts:
        check_guard()
    assert all(-2 <= token < vocab_size for token in tokens.tolist())
