"""Whole steps on a GPU: CUDA graphs give what steps without them give, and no step waits for the device in between."""

from dataclasses import replace

import pytest
import torch

from cluster import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5], list(range(1, 40)), [9, 8, 7], [300, 2, 300, 2], list(range(100, 117))]
PARAMS = [
    SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=n, ignore_eos=True) for n in (30, 4, 17, 1, 9)
]


def llm_of(folder, **options):
    options = {"dtype": "float32", "device": "cuda", "kv_cache_bytes": 4 << 20, **options}
    return LLM(folder, skip_tokenizer=True, **options)


def tokens(llm):
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(demo_checkpoint):
    with llm_of(demo_checkpoint, device="cpu") as llm:
        return tokens(llm)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_tokens_are_those_of_the_cpu(demo_checkpoint, expected, num_shards, cuda_graphs):
    """Sequences end one after another, so steps of all sizes come; a second round finds them captured."""
    with llm_of(demo_checkpoint, num_expert_shards=num_shards, cuda_graphs=cuda_graphs) as llm:
        assert tokens(llm) == expected
        assert tokens(llm) == expected
        if cuda_graphs:
            assert len(llm.engine.runner.graphs._captured) > 1


@pytest.mark.parametrize("weights", ["int8+lm_head", "int4-32-zeros", "int4"])
def test_weights_in_fewer_bits_give_the_tokens_of_the_cpu(demo_checkpoint, weights):
    found = []
    for device in ("cpu", "cuda"):
        with llm_of(demo_checkpoint, device=device, quantization=weights) as llm:
            found.append(tokens(llm))
    assert found[0] == found[1]


def test_contexts_that_outgrow_a_graph_get_another(demo_checkpoint):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=30, ignore_eos=True)
    answers = []
    for options in ({"device": "cpu"}, {"cuda_graphs": True}):
        with llm_of(demo_checkpoint, **options) as llm:
            [output] = llm.generate([[7, 8, 9] * 80], params)
            answers.append(output.token_ids)
    assert answers[0] == answers[1]
    assert sorted(longest for _, longest in llm.engine.runner.graphs._captured) == [256, 512]


def test_captured_steps_count_the_rows_of_every_expert(demo_checkpoint):
    counts = []
    for cuda_graphs in (False, True):
        with llm_of(demo_checkpoint, cuda_graphs=cuda_graphs) as llm:
            tokens(llm)
            [shard] = llm.experts.transport.shards.values()
            counts.append(shard.expert_tokens.cpu())
    assert torch.equal(*counts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_between_its_tokens_and_its_hidden_states_a_step_never_waits_for_the_device(
    demo_checkpoint, cuda_graphs, dtype
):
    with llm_of(demo_checkpoint, dtype=dtype, cuda_graphs=cuda_graphs) as llm:
        runner, params = llm.engine.runner, replace(PARAMS[0], max_tokens=64)
        llm.generate(PROMPTS, params)  # kernels are compiled, graphs captured
        forward, seen = runner.forward, []

        def watched(scheduled):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return forward(scheduled)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                seen.append(len(scheduled))

        runner.forward = watched
        llm.generate(PROMPTS, params)
        assert len(seen) > 60
