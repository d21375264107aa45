"""`moe-cluster bench gpu` as far as it goes without a GPU: its checkpoint, its bound, its refusal."""

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.bench import checkpoint as bench_checkpoint
from cluster.bench.checkpoint import made_checkpoint
from cluster.bench.gpu import memory_bound
from cluster.bench.throughput import Workload
from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.cli import main
from cluster.config import read_model_config

WORK = Workload(batches=(100,), prompt_tokens=1000, output_tokens=1000, repeats=1, vocab_size=2048)
SMALL = {
    **A2_7B_CONFIG, "hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048, "eos_token_id": 2047,
    "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture
def weightless(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_checkpoint, "SHAPES", {"a2.7b": SMALL})
    return made_checkpoint("a2.7b", 2, tmp_path, lambda made, total: None, with_files=False)


def test_weights_without_files_are_the_same_for_whoever_draws_them(weightless):
    assert not list(weightless.glob("*.safetensors*"))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = []
    for num_shards in (1, 3):
        with LLM(weightless, dtype="float32", num_expert_shards=num_shards, kv_cache_bytes=1 << 22) as llm:
            answers.append(llm.generate([[1, 2, 3]], params)[0].token_ids)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_the_bound_is_that_of_the_published_shapes():
    """3.1 GB dense, of which the embedding's 0.6 GB are looked up, not read; 24.9 GB routed; 196,608 bytes a token.
    Batch 100 at 1500 tokens: 27.4 GB + 29.5 GB a step, so 4.8 TB/s make 84 steps/s, 8.4 requests of 1000 tokens/s."""
    config = read_model_config(A2_7B_CONFIG)
    assert memory_bound(config, WORK, 4.8e12) == pytest.approx(8.4, rel=0.02)


def test_the_bound_of_4_bits_is_that_of_the_bytes_that_are_kept():
    """12.45 billion routed weights, 4 bits and an eighth of a bit each for scales, and 1 % for the rows' heads: 6.5 GB.
    Of the 3.1 GB dense that are read, the last layer keeps 0.62, and the others' 2.5 become 0.65. With 29.5 GB of keys
    and values a step reads 37.3 GB."""
    config = read_model_config(A2_7B_CONFIG)
    assert memory_bound(config, WORK, 4.8e12, "int4") == pytest.approx(480 / 37.3, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
