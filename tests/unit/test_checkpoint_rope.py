"""Scaled positions: cosines and sines are transformers' own, bit for bit, and the context is vLLM's."""

import copy
from typing import Any

import pytest
import torch
from configs import config
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding

from cluster.checkpoint.info import max_model_len
from cluster.config import EngineConfig, read_model_config
from cluster.errors import CheckpointError, SetupError
from cluster.model.layers.rope import RotaryEmbedding

DOCUMENTED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 1024,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.25, 1.5], "long_factor": [1.5, 2.0, 4.5, 9.0]}
NEW = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"rope_scaling": DOCUMENTED}, 16384),
        ({"rope_scaling": DOCUMENTED, "max_position_embeddings": 16384}, 16384),
        ({"rope_scaling": DOCUMENTED, "max_position_embeddings": 32768}, 16384),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 1001}}, 2502),
        ({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_scaling": DOCUMENTED | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}}, 16384),
        ({"rope_scaling": DOCUMENTED | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}}, 16384),
        ({"rope_scaling": DOCUMENTED | {"beta_fast": 0, "mscale": 0}}, 16384),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 5}}, 40),
        ({"rope_scaling": DOCUMENTED | {"beta_fast": 1, "beta_slow": 32}}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.7}, "head_dim": 10}, 6963),
        ({"rope_scaling": LLAMA3}, 4096),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.5, "rope_theta": 5e5}, "rope_theta": None}, 4096),
        ({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_scaling": LONGROPE | {"factor": 3.0, "attention_factor": 1.25}}, 4096),
        ({"rope_parameters": NEW, "rope_theta": None}, 2000),
        ({"rope_parameters": NEW, "rope_theta": 5e5}, 2000),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None}, 4096),
        ({"rope_scaling": {}}, 4096),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1.5}, "head_dim": 10}, 6144),
        ({"rope_scaling": DOCUMENTED, "rope_parameters": {**DOCUMENTED, "rope_type": "yarn"}}, 16384),
    ],
    ids=str,
)  # fmt: skip
def test_positions_are_those_of_transformers_up_to_vllms_context(changes: dict[str, Any], context: int) -> None:
    raw = config(max_position_embeddings=4096) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    read = read_model_config(raw)
    assert max_model_len(read, EngineConfig()) == context
    assert max_model_len(read, EngineConfig(max_model_len=context)) == context
    with pytest.raises(SetupError, match=f"the checkpoint's context has {context} tokens"):
        max_model_len(read, EngineConfig(max_model_len=context + 1))
    oracle = Qwen2MoeRotaryEmbedding(Qwen2MoeConfig(**copy.deepcopy(raw)))  # it writes into what it is given
    positions = torch.tensor([0, 1, 7, context // 2, context - 1])
    expected = oracle(torch.zeros(1), positions[None])
    lengths = torch.full_like(positions, context)
    found = RotaryEmbedding(read.rope, read.head_dim)(positions, lengths, torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[:, 0], theirs[0])


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}, LONGROPE], ids=str)
def test_each_row_has_the_frequencies_of_its_own_length(scaling: dict[str, Any]) -> None:
    """Rows of sequences of 30, 41, 64 and 40 tokens in one step, beyond an original context of 40."""
    raw = config(max_position_embeddings=40, rope_scaling=scaling)
    raw |= {"original_max_position_embeddings": 40} if scaling is LONGROPE else {}
    read = read_model_config(raw)
    embedding = RotaryEmbedding(read.rope, read.head_dim)
    lengths = torch.tensor([30] * 3 + [41] * 2 + [64] * 20 + [40])
    positions = torch.tensor([0, 7, 29, 3, 40, *range(44, 64), 39])
    found = embedding(positions, lengths, torch.float32)
    for length in (30, 41, 64, 40):
        oracle = Qwen2MoeRotaryEmbedding(Qwen2MoeConfig(**copy.deepcopy(raw)))
        expected = oracle(torch.zeros(1), torch.arange(length)[None])
        rows = lengths == length
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[rows, 0], theirs[0, positions[rows]])
    assert [read.rope.frequency_length(n) > 0 for n in (1, 40, 41)] == [False, False, True]


def test_a_type_that_is_null_is_none_at_all() -> None:
    """transformers ends with KeyError, and vLLM does not know the type: there is nothing that it could mean else."""
    for scaling in (
        {"rope_type": None},
        {"type": None},
        {"rope_type": None, "factor": None},
        {"type": None, "factor": 1},
    ):
        read = read_model_config(config(rope_scaling=scaling))
        assert read.rope.rope_type == "default"
        assert read.context_length == 256
    read = read_model_config(config(rope_scaling=DOCUMENTED | {"rope_type": None}))
    assert (read.rope.rope_type, read.context_length) == ("yarn", 16384)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "rope has factor and no rope_type: say which it is"),
        ({"rope_scaling": {"rope_type": None, "original_max_position_embeddings": 9}}, "and no rope_type"),
        ({"rope_scaling": {"type": "yarn"}}, "rope: factor is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope: factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e25}}, "a context of 1 to 2,147,483,647 tokens must result"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "a number above 0 is needed"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-9}}, "a context of 1 to 2,147,483,647 tokens must result"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate is 'no'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast is -1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type ['yarn'] is not served"),
        ({"rope_scaling": DOCUMENTED, "rope_parameters": NEW}, "put everything into rope_parameters"),
        (
            {"rope_scaling": DOCUMENTED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "put everything into rope_parameters",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "for 'full_attention', only one embedding for all layers",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not served"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "default, linear, dynamic, yarn, llama3 and longrope are"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope: factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "dynamic scaling needs 4 at least"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope: low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor must be above low_freq_factor"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0, 2.0]}}, "long_factor has 2 numbers, heads of 8 need 4"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1, 2, 3, 0]}}, "[1, 2, 3, 0], a list of numbers above 0"),
        ({"rope_scaling": LONGROPE | {"long_factor": None}}, "rope: long_factor is missing"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
            "dual chunk attention (dual_chunk_attention_config) is not served; plain attention gives the same up to "
            "253,952 tokens: take the key out and set max_position_embeddings to that",
        ),
        ({"dual_chunk_attention_config": True}, "dual chunk attention (dual_chunk_attention_config) is not served"),
    ],
)
def test_scaling_that_says_two_things_or_nothing_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_model_config(config(max_position_embeddings=4096) | changes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
