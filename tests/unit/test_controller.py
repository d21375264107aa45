"""What the expert controller does without Ray."""

from dataclasses import replace

from cluster.config import ClusterConfig
from cluster.runtime.control.controller import ExpertController
from cluster.runtime.control.shard_process import ShardProcess

CONFIG = ClusterConfig(model="model")


def test_a_redeployed_configuration_reaches_what_runs_already(monkeypatch):
    monkeypatch.setattr("cluster.runtime.control.controller.prepare_process", lambda num_threads: None)
    controller = ExpertController("group", CONFIG, collect_metrics=False)
    controller.state.shards[0] = ShardProcess("group", 0, CONFIG)
    config = replace(CONFIG, shard_timeout_s=5.0, spare_processes=False)
    controller._follow(config)
    assert controller.state.config is controller.spares.config is controller.state.shards[0].config is config
