"""A model without routed experts: no shards, whatever was asked for, and nothing of a cluster's is missed."""

import pytest
from configs import DENSE_CONFIGS

from cluster import LLM, SamplingParams, llm
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import EngineConfig, read_model_config
from cluster.engine.preflight import check_checkpoint
from cluster.errors import SetupError
from cluster.experts import eplb
from cluster.experts.placement import num_shards_for, plan_evenly

RAW = DENSE_CONFIGS["no layer sparse"]


@pytest.fixture
def dense_dir(tmp_path):
    write_checkpoint(tmp_path / "dense", RAW, seed=1)
    return tmp_path / "dense"


def test_a_config_whose_layers_are_all_dense_has_no_experts():
    config = read_model_config(RAW)
    assert config.moe is None
    assert (config.num_experts, config.num_experts_per_tok, config.sparse_layers) == (0, 0, ())
    assert config.expert_bytes("bfloat16") == 0


def test_its_plan_is_empty_and_balanced():
    plan = plan_evenly((), 0, num_shards_for(0, 2))
    assert (plan.num_shards, plan.layer_ids) == (0, ())
    assert eplb.imbalance(plan, []) == 1.0
    with pytest.raises(SetupError, match="0 experts"):
        plan_evenly((), 0, 2)


@pytest.mark.parametrize("num_shards", [0, 2, 500])
def test_a_start_needs_no_shards_that_fit(dense_dir, num_shards):
    assert check_checkpoint(dense_dir, EngineConfig(), num_shards, tokenizer=False).config.moe is None


def test_offline_it_runs_in_this_process_whatever_the_transport(dense_dir, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("expert shards were started")

    monkeypatch.setattr(llm, "RayExperts", unwanted)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answers = []
    for options in ({}, {"transport": "auto", "num_expert_shards": 3}):
        with LLM(dense_dir, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20, **options) as model:
            answers.append(model.generate([1, 2, 3], params)[0].token_ids)
            assert model.info.num_experts == 0
    assert answers[0] == answers[1]
