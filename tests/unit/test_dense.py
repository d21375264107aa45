"""A model without routed experts: no shards, whatever was asked for, and nothing of a cluster's is missed."""

from argparse import Namespace
from dataclasses import replace

import pytest
from configs import DENSE_CONFIGS
from rich.console import Console

from cluster import LLM, SamplingParams
from cluster.chaos.command import KINDS, possible_kinds, run
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import EngineConfig, read_model_config
from cluster.console import render_status
from cluster.engine.preflight import check_checkpoint
from cluster.errors import SetupError, Unavailable
from cluster.experts import eplb
from cluster.experts.placement import num_shards_for, plan_evenly
from cluster.runtime.operate import Part
from cluster.runtime.start import offline
from cluster.status import ClusterStatus, ProcessInfo, ReplicaStatus
from cluster.types import EngineStats

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

    monkeypatch.setattr(offline, "RayExperts", unwanted)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answers = []
    for options in ({}, {"transport": "auto", "num_expert_shards": 3}):
        with LLM(dense_dir, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20, **options) as model:
            answers.append(model.generate([1, 2, 3], params)[0].token_ids)
            assert model.info.num_experts == 0
    assert answers[0] == answers[1]


def status_of(plan):
    return ClusterStatus(
        epoch=1, shards=(), replicas=(), metrics_addresses=(), draining=False, plan=plan, published=True, load=[]
    )


def shown(status):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_status(status))
    return captured.get()


def test_a_status_shows_the_share_of_guessed_tokens_that_were_right_where_there_are_any():
    def replica(**counts):
        stats = EngineStats(running=1, waiting=0, used_blocks=0, num_blocks=1, generated_tokens=0, at=0.0, **counts)
        process = ProcessInfo(pid=7, node_id="n", gpu_ids=(), version="1", slot=0)
        return ReplicaStatus(
            name="r", process=process, engine=None, asked_at=0.0, epoch=1, loaded_bytes=0, total_bytes=0, stats=stats
        )

    status = status_of(plan_evenly((), 0, 0))
    assert "right" not in shown(replace(status, replicas=(replica(),)))
    text = shown(replace(status, replicas=(replica(drafted_tokens=2000, accepted_tokens=1500), replica())))
    assert "75% right of" in text


def test_its_status_shows_no_shards_and_no_placement():
    text = shown(status_of(plan_evenly((), 0, 0)))
    assert text.startswith("SERVING   dense model")
    assert "expert" not in text
    assert "imbalance" not in text
    assert "expert shard (0 of 2)" in shown(replace(status_of(None), target_shards=2))  # not known yet


class Cluster:
    fronts_of = ("ingress", "haproxy")

    def status(self):
        return status_of(plan_evenly((), 0, 0))

    def fronts(self):
        process = ProcessInfo(pid=7, node_id="n", gpu_ids=())
        return [Part(role=role, name=role, process=process) for role in self.fronts_of]


def test_chaos_leaves_out_the_faults_of_shards():
    possible = possible_kinds(KINDS, Cluster())
    fronts = {"kill-ingress", "kill-haproxy"}
    assert set(possible) == {"kill-replica", "kill-controller", "end-replica", "stop-replica", *fronts}
    with pytest.raises(SetupError, match="is dense"):
        possible_kinds(("kill-shard", "rebalance"), Cluster())


def test_chaos_kills_ranks_where_replicas_have_some():
    class OfRanks(Cluster):
        def status(self):
            process = ProcessInfo(pid=7, node_id="n", gpu_ids=(), rank_pids=(8,))
            replica = ReplicaStatus(name="r", process=process, engine=None, asked_at=0.0)
            return replace(status_of(plan_evenly((), 0, 0)), replicas=(replica,))

    assert "kill-rank" in possible_kinds(KINDS, OfRanks())
    with pytest.raises(SetupError, match="one process each"):
        possible_kinds(("kill-rank",), Cluster())


def test_chaos_kills_no_haproxy_where_serves_own_proxy_stands():
    class Bare(Cluster):
        fronts_of = ("ingress",)

    assert "kill-haproxy" not in possible_kinds(KINDS, Bare())
    with pytest.raises(SetupError, match="own proxy"):
        possible_kinds(("kill-haproxy",), Bare())


def test_chaos_says_which_faults_it_leaves_out(monkeypatch, capsys):
    """Before it connects: here to nobody."""

    def nobody(args):
        raise Unavailable("nobody serves")

    monkeypatch.setattr("cluster.client.options.connect", nobody)
    with pytest.raises(Unavailable):
        run(Namespace(kinds="kill-shard,kill-replica,cut-streams"), Cluster())
    assert capsys.readouterr().err == "the model is dense, it has no shards: left out kill-shard, cut-streams\n"
