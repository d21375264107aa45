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
    found = RotaryEmbedding(read.rope, read.head_dim)(positions, torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[:, 0], theirs[0])


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
    ],
)
def test_scaling_that_says_two_things_or_nothing_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_model_config(config(max_position_embeddings=4096) | changes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
