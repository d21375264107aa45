"""Configurations are read in both key styles, and refused with the key, the value and what is needed."""

from dataclasses import fields

import pytest
from configs import BASE, config, dense

from cluster.config import ClusterConfig, EngineConfig, read_model_config
from cluster.config.options import MOST_CALLS, MOST_SEQS, type_of
from cluster.errors import CheckpointError, SetupError


def test_old_and_new_key_styles_say_the_same():
    old = read_model_config(
        config(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128})
    )
    new = read_model_config(
        config(
            rope_theta=None, torch_dtype=None, dtype="float32", eos_token_id=[1],
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 128,
            },
        )
    )  # fmt: skip
    assert old == new


def test_released_checkpoints_have_full_attention_in_every_layer():
    read = read_model_config(config(sliding_window=4096, max_window_layers=28))
    assert set(read.layer_types) == {"full_attention"}
    assert read.window(0) is None


def test_a_sliding_window_is_on_in_even_layers_below_max_window_layers():
    read = read_model_config(
        config(use_sliding_window=True, sliding_window=9, max_window_layers=3, num_hidden_layers=6)
    )
    assert [read.window(i) for i in range(6)] == [9, None, 9, None, None, None]


def test_in_dense_qwen2_a_sliding_window_is_on_from_max_window_layers():
    read = read_model_config(dense(use_sliding_window=True, sliding_window=9, max_window_layers=4, num_hidden_layers=6))
    assert [read.window(i) for i in range(6)] == [None, None, None, None, 9, 9]
    assert read_model_config(dense(sliding_window=9, max_window_layers=1)).window(2) is None


def test_dense_qwen2_has_biases_whatever_the_config_says():
    """transformers' Qwen2Attention does not read qkv_bias."""
    read = read_model_config(dense(qkv_bias=False))
    assert (read.qkv_bias, read.moe) == (True, None)


def test_sparse_layers_follow_step_and_mlp_only_layers():
    read = read_model_config(config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert read.sparse_layers == (1, 5)


def test_bytes_are_those_of_the_shapes():
    """A2.7B's: 3 × 2048 × 1408 × 2 an expert, 196,608 of KV cache a token."""
    read = read_model_config(
        config(
            hidden_size=2048, moe_intermediate_size=1408, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16,
        )
    )  # fmt: skip
    assert read.expert_bytes("bfloat16") == 17_301_504
    assert read.kv_bytes_per_token("bfloat16") == 196_608


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "'llama', one of qwen2, qwen2_moe is needed"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_experts_per_tok": 61}, "more than num_experts"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_attention_heads": 4096, "num_key_value_heads": 4096}, "head_dim is 0, a whole number from 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_scaling": "yarn"}, "must be objects"),
        ({"rope_scaling": {"type": "ntk"}}, "'ntk' is not served"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor is '2'"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": ["sliding_attention"] * 3}, "do not set one"),
        ({"mlp_only_layers": "x"}, "mlp_only_layers is 'x'"),
        ({"eos_token_id": [-1]}, "eos_token_id is [-1]"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method is 'aqlm'"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(changes, named):
    raw = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    with pytest.raises(CheckpointError) as raised:
        read_model_config(raw)
    assert named in str(raised.value)
    assert "config.json" in str(raised.value)


def test_arguments_are_typed():
    read = ClusterConfig.from_mapping({"model": "/m", "expert_shards": 7, "drain_timeout_s": 5, "max_model_len": None})
    assert (read.expert_shards, read.drain_timeout_s, read.max_model_len) == (7, 5.0, None)
    assert isinstance(read.drain_timeout_s, float)
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert ClusterConfig.from_mapping({"model": "/m", "rope_scaling": yarn}).engine().rope_scaling == yarn


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "'model' is missing"),
        ({"model": ""}, "model is empty"),
        ({"model": "/m", "shards": 2}, "unknown argument 'shards'"),
        ({"model": "/m", "expert_shards": "2"}, "expert_shards is '2', int is needed"),
        ({"model": "/m", "expert_shards": True}, "expert_shards is True"),
        ({"model": "/m", "expert_shards": -1}, "expert_shards is -1, at least 0"),
        ({"model": "/m", "transport": "pigeon"}, "transport is 'pigeon'"),
        ({"model": "/m", "dtype": "int4"}, "dtype is 'int4'"),
        ({"model": "/m", "gpus_per_expert_shard": -1}, "gpus_per_expert_shard is -1"),
        ({"model": "/m", "metrics_port": 70000}, "at most 65535"),
        ({"model": "/m", "attention_replicas": 10**25}, "at most 10000"),
        ({"model": "/m", "recovery_timeout_s": 1e25}, "at most 1e+09"),
        ({"model": "/m", "drain_timeout_s": 1e25}, "at most 1e+09"),
        ({"model": "/m", "shard_timeout_s": 1e25}, "at most 1e+09"),
        ({"model": "/m", "kv_cache_bytes": 0}, "kv_cache_bytes is 0"),
        ({"model": "/m", "rope_scaling": "yarn"}, "rope_scaling is 'yarn', an object or null is needed"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, named):
    with pytest.raises(SetupError) as raised:
        ClusterConfig.from_mapping(arguments)
    assert named in str(raised.value)


def test_the_engines_part_has_the_clusters_values():
    assert ClusterConfig(model="/m", max_num_seqs=5, dtype="float16").engine() == EngineConfig(
        max_num_seqs=5, dtype="float16"
    )


@pytest.mark.parametrize("name", ["cpus_per_attention_replica", "cpus_per_expert_shard", "shard_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e-5])
def test_nothing_and_endless_are_refused_where_they_cannot_be(name, value):
    with pytest.raises(SetupError, match=name):
        ClusterConfig(model="m", **{name: value})


@pytest.mark.parametrize("name", ["gpus_per_attention_replica", "gpus_per_expert_shard"])
def test_gpus_are_parts_of_one_or_whole(name):
    """As Ray counts them: it refuses others, in its own words and when a process has started already."""
    for value in (1.5, 1e-5, -1.0, float("nan"), float("inf")):
        with pytest.raises(SetupError, match=name):
            ClusterConfig(model="m", **{name: value})
    for value in (None, 0, 0.25, 1, 2.0):
        assert getattr(ClusterConfig(model="m", **{name: value}), name) == value


NUMBERS = [f.name for f in fields(ClusterConfig) if type_of(ClusterConfig, f.name) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_end_at_which_it_still_works(name):
    """None is read that a later part, Ray's 32 bits say, cannot have; one that cannot be is refused by its name."""
    for value in (10**25, 1e300):
        with pytest.raises(SetupError, match=f"^{name} is .*at most|^{name} is .*whole number"):
            ClusterConfig(model="m", **{name: value})


def test_calls_of_all_kinds_together_are_counted_in_32_bits():
    assert MOST_CALLS + MOST_SEQS + 64 < 1 << 31
