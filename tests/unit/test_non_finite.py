"""A request for which the model's numbers are NaN or infinite ends with an error that says so, and leaves no prefix."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cluster import LLM, SamplingParams
from cluster.engine.runner import non_finite
from cluster.errors import NonFiniteOutput
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import NoFiniteNumbers, SamplingRow, sample
from cluster.types import SAMPLING_DEFAULTS

BAD = 5  # the token whose row is not finite
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=6, ignore_eos=True)
HEALTHY = [1, 2, 3]


def row(**params):
    return SamplingRow(
        token_ids=[1],
        num_prompt_tokens=1,
        params=SamplingParams(**params).with_defaults(SAMPLING_DEFAULTS),
        penalties=PenaltyState(),
    )


KINDS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.5},
    "with log-probabilities": {"temperature": 0, "logprobs": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_one_number_that_is_not_finite_fails_its_row_alone(kind, value, dtype):
    logits = torch.randn(3, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = [row(**KINDS[kind], **({"seed": i} if kind != "greedy" else {})) for i in range(3)]
    first, _, last = sample(logits.clone(), rows)
    for place in (0, 200, 383):
        broken = logits.clone()
        broken[1, place] = value
        chosen = sample(broken, rows)
        assert isinstance(chosen[1], NoFiniteNumbers)
        assert (chosen[0], chosen[2]) == (first, last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_any_number_fails_and_one_that_has_some_does_not(kind):
    """Minus infinity is a probability of 0: a float16 logit that overflows below leaves the others as they are."""
    logits = torch.full((2, 384), -math.inf)
    logits[1, 7] = 3.0
    nothing, something = sample(logits, [row(**KINDS[kind])] * 2)
    assert isinstance(nothing, NoFiniteNumbers)
    assert something[0] == 7


@settings(max_examples=100, deadline=None)
@given(
    num_tokens=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    places=st.sets(st.integers(0, 53), max_size=3),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_row_that_is_not_finite_is_found_wherever_it_stands(num_tokens, places, value, dtype):
    hidden_states = torch.full((sum(num_tokens), 64), 60000.0).to(dtype)  # a sum in float16 would overflow
    expected = set()
    for place in places:
        if place < len(hidden_states):
            hidden_states[place, place % 64] = value
            expected.add(next(i for i in range(len(num_tokens)) if place < sum(num_tokens[: i + 1])))
    assert set(non_finite(hidden_states, num_tokens)) == expected


def write_broken(demo_checkpoint, folder, **changes):
    """The demo with tensors changed in place: a function for each one's name, whose dots are two underscores."""
    shutil.copytree(demo_checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
        for name in tensors:
            if change := changes.pop(name.replace(".", "__"), None):
                change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
    assert not changes
    return folder


def fill_row(value):
    return lambda tensor: tensor[BAD].fill_(value)


@pytest.fixture(scope="module")
def broken(demo_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken") / "demo"
    return write_broken(demo_checkpoint, folder, model__embed_tokens__weight=fill_row(math.nan))


def make(model_dir, **options):
    return LLM(model_dir, **{"dtype": "float32", "kv_cache_bytes": 1 << 20, "block_size": 4, **options})


def reused(llm, prompt):
    """Tokens of a prompt whose keys and values are found; its end does not matter."""
    schedule, batches = llm.engine.scheduler.schedule, []
    llm.engine.scheduler.schedule = lambda: batches.append(schedule()) or batches[-1]
    try:
        llm.generate([prompt], GREEDY)
    except NonFiniteOutput:
        pass
    finally:
        llm.engine.scheduler.schedule = schedule
    return sum(batch.num_reused_tokens for batch in batches)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_without_numbers_ends_its_request_and_the_one_beside_it_goes_on(broken, demo_checkpoint, dtype):
    with make(demo_checkpoint, dtype=dtype) as llm:
        [expected] = llm.generate([HEALTHY], GREEDY)
    with make(broken, dtype=dtype) as llm:
        with pytest.raises(NonFiniteOutput, match=r"request llm-1: the model gave no finite numbers") as met:
            llm.generate([HEALTHY, [BAD] * 40], GREEDY)
        assert met.value.outputs[0].token_ids == expected.token_ids
        assert (met.value.grpc_code, met.value.public) == ("INTERNAL", True)
        assert llm.engine.blocks.num_used == 0


def test_blocks_of_such_a_request_are_found_by_nobody(broken):
    with make(broken) as llm:
        assert reused(llm, [BAD] * 40) == 0
        assert reused(llm, [BAD] * 40) == 0


def test_blocks_that_it_computed_before_its_numbers_broke_are_not_found_either(broken):
    """In chunks of 8: five are finite, and findable while it runs; the sixth has the token without numbers."""
    prompt = [*range(100, 140), BAD]
    with make(broken, max_num_batched_tokens=8) as llm:
        assert reused(llm, prompt) == 0
        assert reused(llm, prompt) == 0


def test_blocks_that_a_healthy_request_computed_stay_findable(broken):
    """Of 40 tokens in blocks of 4 the healthy one leaves ten; the broken one finds them, and so does the next."""
    prefix = list(range(100, 140))
    with make(broken) as llm:
        assert reused(llm, [*prefix, 1]) == 0
        assert reused(llm, [*prefix, BAD]) == 40
        assert reused(llm, [*prefix, BAD]) == 40
        assert reused(llm, [*prefix, 2]) == 40


def test_a_prompt_ends_with_its_first_chunk_that_is_not_finite(broken):
    with make(broken, max_num_batched_tokens=8) as llm:
        steps = []
        run = llm.engine.runner.run
        llm.engine.runner.run = lambda batch: steps.append(batch.num_tokens) or run(batch)
        with pytest.raises(NonFiniteOutput):
            llm.generate([[BAD] * 40], GREEDY)
    assert steps[0] == 8
    assert set(steps[1:]) <= {1}, "and what the engine computes for itself"


def test_logits_that_are_infinite_end_their_request_too(demo_checkpoint, tmp_path):
    """One row of the head: that token's logit is infinite, or NaN where infinities of both signs meet."""
    folder = write_broken(demo_checkpoint, tmp_path / "demo", lm_head__weight=fill_row(math.inf))
    with make(folder) as llm:
        for params in (GREEDY, SamplingParams(seed=1, max_tokens=6)):
            with pytest.raises(NonFiniteOutput):
                llm.generate([HEALTHY], params)


@pytest.mark.parametrize("call", ["embed", "prompt_logprobs"])
def test_a_result_without_numbers_ends_alone_too(broken, call):
    """Between two healthy ones, in chunks; its blocks are found by nobody."""
    with make(broken, max_num_batched_tokens=8) as llm:
        [expected] = getattr(llm, call)([HEALTHY])
        with pytest.raises(NonFiniteOutput, match="the model gave no finite numbers") as met:
            getattr(llm, call)([HEALTHY, [*range(100, 120), BAD], HEALTHY])
        first, failed, last = met.value.outputs
        assert failed is None
        # Torch's float32 products round by the rows beside them: the chunks of both differ.
        np.testing.assert_allclose(first.numbers.array(), last.numbers.array(), rtol=1e-5, atol=1e-6)
        kept = expected.embedding if call == "embed" else expected.logprobs
        assert first.prompt_token_ids == tuple(HEALTHY)
        assert len(first.numbers.array()) == len(kept)
        assert reused(llm, [*range(100, 120), 1]) == 0
        assert llm.engine.blocks.num_used == 0


def test_hidden_states_are_given_as_they_are(broken):
    """Whoever asks for logits looks at all of them: NaN in one row does not hide the rows before it."""
    with make(broken) as llm:
        logits = llm.logits([*HEALTHY, BAD])
        assert logits[:3].isfinite().all()
        assert logits[3].isnan().all()


def test_finite_weights_whose_numbers_overflow_in_float16_end_their_request_alone(demo_checkpoint, tmp_path):
    """The token's embedding is float16's largest number, and attention adds some hundreds to every token's."""
    folder = write_broken(
        demo_checkpoint, tmp_path / "demo", model__embed_tokens__weight=fill_row(65504.0),
        model__layers__0__self_attn__o_proj__weight=lambda tensor: tensor.mul_(1000.0),
    )  # fmt: skip
    with make(folder, dtype="float16") as llm:
        [expected] = llm.generate([HEALTHY], GREEDY)
        with pytest.raises(NonFiniteOutput) as met:
            llm.generate([HEALTHY, [BAD] * 40], GREEDY)
        assert met.value.outputs[0].token_ids == expected.token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_cuda_finds_the_same_rows(value, dtype):
    logits = torch.randn(3, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, 200] = value
    chosen = sample(logits.cuda(), [row(temperature=0)] * 3)
    assert [isinstance(one, NoFiniteNumbers) for one in chosen] == [False, True, False]
    assert non_finite(logits.cuda(), [1, 1, 1]) == [1]
    assert non_finite(logits.cuda(), [1, 2]) == [1]
