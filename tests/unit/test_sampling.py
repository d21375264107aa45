"""The batched sampler beside the definition, which takes row by row; and the CUDA device beside the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_tools import VOCAB_SIZES, check, random_logits, random_rule
from torch._subclasses.fake_tensor import FakeTensorMode

from cluster.kernels.sampling import batched
from cluster.kernels.sampling.batched import choose_in_batch
from cluster.kernels.sampling.rule import NONE_LEFT, NOT_FINITE, PLAIN, Rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32), num_rows=st.integers(1, 9), vocab_size=st.sampled_from(VOCAB_SIZES),
    at_once=st.sampled_from([1, 3000, 1 << 20]),
)  # fmt: skip
def test_a_batch_is_chosen_as_its_rows_are(dtype, seed, num_rows, vocab_size, at_once):
    random = np.random.default_rng(seed)
    logits = random_logits(random, num_rows, vocab_size).to(dtype)
    rules = [random_rule(random, vocab_size) for _ in range(num_rows)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batched, "_AT_ONCE", {"cpu": at_once})
        check(choose_in_batch(logits, rules), logits, rules)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), vocab_size=st.sampled_from(VOCAB_SIZES), data=st.data())
def test_a_gpu_finds_the_nearest_tokens_that_the_cpu_finds(seed, vocab_size, data):
    distances = random_logits(np.random.default_rng(seed), 4, vocab_size).abs().nan_to_num(nan=0.0)
    num = data.draw(st.integers(1, vocab_size))
    for one, other in zip(batched._nearest(distances, num), batched._nearest_on_cpu(distances, num), strict=True):
        assert torch.equal(one, other)


def test_of_equal_tokens_the_lowest_is_first():
    """Candidates in order are 1, 3, 2 of top_k 3: a third each, of which only the first is in top_p."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    for rule in (Rule(), Rule(temperature=1.0, top_k=1), Rule(temperature=1.0, top_p=0.3)):
        assert choose_in_batch(logits, [rule]).token_ids == [1]
    drawn = {choose_in_batch(logits, [Rule(temperature=1.0, top_k=3, seed=i)]).token_ids[0] for i in range(60)}
    assert drawn == {1, 2, 3}


def test_a_row_for_which_nothing_is_left_or_finite_says_so():
    logits = torch.tensor([[-torch.inf, 1.0], [0.0, torch.nan], [0.0, 1.0]])
    only_one = Rule(banned=np.array([1], dtype=np.int32))
    assert choose_in_batch(logits, [only_one, only_one, PLAIN]).token_ids == [NONE_LEFT, NOT_FINITE, 1]


def mixed(random, num_rows, vocab_size):
    return [
        random_rule(random, vocab_size)._replace(num_top=5, position=7) if i % 4 else PLAIN for i in range(num_rows)
    ]


def test_all_stays_on_a_gpu(monkeypatch):
    """On fake CUDA tensors, of which two on different devices raise."""
    random = np.random.default_rng(0)
    rules = [random_rule(random, 300)._replace(num_top=5) for _ in range(40)]

    def shipped(arrays, dtype, device):
        kind = {np.int64: torch.int64, np.float64: torch.float64}[dtype]
        return {name: torch.empty(len(np.asarray(array)), dtype=kind, device=device) for name, array in arrays.items()}

    monkeypatch.setattr(batched, "_shipped", shipped)
    with FakeTensorMode():
        logits = torch.empty(40, 300, device="cuda")
        tokens = batched._choose(logits, rules, torch.empty(40, 300, dtype=torch.bool, device="cuda"))
        assert (tokens.device.type, tokens.shape, tokens.dtype) == ("cuda", (40,), torch.int64)
        found = batched._logprobs(logits, tokens, 5)
        assert (found.device.type, found.shape, found.dtype) == ("cuda", (40, 11), torch.float64)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 151936])
def test_cuda_chooses_as_the_cpu_does(dtype, vocab_size):
    for seed in range(4 if vocab_size > 10000 else 40):
        random = np.random.default_rng(seed)
        logits = random_logits(random, 16, vocab_size).to(dtype)
        rules = mixed(random, 16, vocab_size)
        check(choose_in_batch(logits.cuda(), rules), logits, rules)


@pytest.mark.gpu
@on_cuda
def test_cuda_waits_for_the_device_once_a_step():
    """Every synchronisation is an error but that of the result, which is replaced."""
    random = np.random.default_rng(0)
    logits = random_logits(random, 16, 2500).cuda()
    rules = mixed(random, 16, 2500)
    expected = choose_in_batch(logits, rules)
    copies = []

    def cpu(tensor):
        torch.cuda.set_sync_debug_mode("default")
        copies.append(tensor.shape)
        return original(tensor)

    original = torch.Tensor.cpu
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "cpu", cpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert choose_in_batch(logits, rules) == expected
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(copies) == 1
