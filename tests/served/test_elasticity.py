"""Shards that come, go and change what they hold while rows are on their way; the dispatcher's answers never change."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from ray.util.placement_group import placement_group_table
from served_tools import beside, wait_until

from cluster.config import ClusterConfig
from cluster.errors import ClusterError, SetupError
from cluster.metrics import DispatchMetrics, new_registry
from cluster.runtime.start.offline import RayExperts

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(demo_checkpoint):
    return ClusterConfig(
        model=str(demo_checkpoint), dtype="float32", device="cpu", expert_shards=2, gpus_per_expert_shard=0.0,
        redundant_experts=4, rebalance_max_moves=64, expert_resource="expert_node",
    )  # fmt: skip


@pytest.fixture(scope="module")
def experts(ray_cluster, config):
    made = RayExperts(config, DispatchMetrics(new_registry(), "test"))
    yield made
    made.close()


def ask(ray, experts, method, *args):
    """Raises what the controller raises."""
    try:
        return ray.get(getattr(experts._controller, method).remote(*args), timeout=60)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@contextmanager
def steady_rows(experts, hot=None):
    """Sends rows through all layers all the time, and compares each answer with the first. Yields each round's seconds.

    hot: the first of the few experts that get all rows.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator)
    ids = torch.stack([torch.randperm(64, generator=generator)[:4] for _ in range(32)])
    if hot is not None:
        ids = ids % 6 + hot
        ids = torch.stack([row.unique(sorted=True)[:1].expand(4) for row in ids])
    weights = torch.rand(32, 4, generator=generator)
    layers = experts.dispatcher.plans.current().layer_ids

    def through():
        return [experts.dispatcher.combine(experts.dispatcher.dispatch(i, x, ids, weights)) for i in layers]

    first, rounds = through(), []

    def run(done):
        while not done.is_set():
            started = time.monotonic()
            for got, wanted in zip(through(), first, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            rounds.append(time.monotonic() - started)

    with beside(run):
        yield rounds


def shard_is_back(ray, experts, shard_id):
    shard = ask(ray, experts, "status").shards[shard_id]
    return shard.state == "up" and shard.respawns == 1


def num_experts(experts):
    return [sum(map(len, layers.values())) for layers in experts.dispatcher.plans.current().slices]


def test_shards_are_kept_to_the_nodes_with_their_resource(ray_cluster, experts):
    [place] = [p for p in placement_group_table().values() if p["name"] == f"{experts._group}:shard-0"]
    assert place["bundles"][0]["expert_node"] == pytest.approx(0.001)


def test_shards_are_added_and_removed_one_at_a_time_under_rows(ray_cluster, experts):
    with steady_rows(experts) as rounds:
        assert ask(ray_cluster, experts, "scale", 4) == "2 -> 4 expert shards"
        assert len(num_experts(experts)) == 4
        assert max(num_experts(experts)) <= 68
        assert ask(ray_cluster, experts, "scale", 2) == "4 -> 2 expert shards"
        assert len(rounds) > 10
    assert len(num_experts(experts)) == 2
    assert sum(num_experts(experts)) >= 4 * 64


def test_a_skewed_load_is_spread_and_the_busiest_experts_get_copies(ray_cluster, experts):
    with steady_rows(experts, hot=0):
        threading.Event().wait(6)  # the controller measures the load every 2 s
        before = ask(ray_cluster, experts, "status").imbalance
        report = ask(ray_cluster, experts, "rebalance")
        after = ask(ray_cluster, experts, "status").imbalance
    assert before > 1.2, report
    assert after <= 1.15, report


def test_a_policy_follows_the_load_by_itself(ray_cluster, experts, config):
    """Of other experts than those that have copies by now; a redeployed configuration sets the policy."""
    policy = replace(config, rebalance_interval_s=0.5, rebalance_threshold=1.1, rebalance_max_moves=256)
    epoch = ask(ray_cluster, experts, "status").epoch
    with steady_rows(experts, hot=40):
        ask(ray_cluster, experts, "apply", policy)
        wait_until(lambda: ask(ray_cluster, experts, "status").epoch > epoch, "the experts move")
        wait_until(lambda: ask(ray_cluster, experts, "status").imbalance <= 1.15, "the load is even")
    ask(ray_cluster, experts, "apply", config)


def test_experts_change_places_under_rows(ray_cluster, experts):
    epoch = experts.dispatcher.plans.current().epoch
    with steady_rows(experts):
        for seed in range(5):
            ask(ray_cluster, experts, "shuffle", 8, seed)
    assert experts.dispatcher.plans.current().epoch >= epoch + 5


def test_every_shard_gets_a_new_process_under_rows(ray_cluster, experts):
    before = ask(ray_cluster, experts, "status").shards
    with steady_rows(experts):
        assert ask(ray_cluster, experts, "roll") == "2 shards have new processes"
    after = ask(ray_cluster, experts, "status").shards
    assert not {shard.process.pid for shard in before} & {shard.process.pid for shard in after}
    assert [shard.respawns for shard in after] == [shard.respawns for shard in before]  # no fault


def test_a_shard_without_memory_keeps_the_old_plan(ray_cluster, experts):
    handle = experts.dispatcher.plans._current().handles[0]
    slices = experts.dispatcher.plans.current().slices
    with steady_rows(experts):
        ray_cluster.get(handle.disturb.remote("no memory", 0.0))
        with pytest.raises(ClusterError, match="the old plan stays"):
            ask(ray_cluster, experts, "shuffle", 8, 99)
    assert experts.dispatcher.plans.current().slices == slices
    assert any("did not load" in fault.what for fault in ask(ray_cluster, experts, "status").faults)


@pytest.mark.parametrize("wrong", [0, 65])
def test_a_number_of_shards_that_cannot_be_is_refused(ray_cluster, experts, wrong):
    with pytest.raises(SetupError, match="ask for 1 to 64"):
        ask(ray_cluster, experts, "scale", wrong)


def test_with_two_copies_rows_go_on_without_a_killed_or_a_stopped_shard(ray_cluster, config):
    """A killed one's rows are computed by other copies: sent again, or asked of them before because it was late.
    A stopped one stays silent; steps that waited for it would take shard_timeout_s, 120 s, each."""
    registry = new_registry()
    more = replace(config, expert_shards=3, min_copies=2, redundant_experts=0, shard_timeout_s=120.0)
    experts = RayExperts(more, DispatchMetrics(registry, "test"))

    def total(name, shard_id):
        return registry.get_sample_value(name, {"replica": "test", "shard_id": str(shard_id)}) or 0

    def num_elsewhere(shard_id):
        return sum(total(f"moecluster_dispatch_{name}_total", shard_id) for name in ("rerouted_rows", "hedged"))

    try:
        assert sum(num_experts(experts)) >= 2 * 4 * 64
        with steady_rows(experts) as rounds:

            def go_on(num_rounds):
                until = len(rounds) + num_rounds
                wait_until(lambda: len(rounds) >= until, "rows")

            go_on(20)  # the usual waits are known
            handles = experts.dispatcher.plans._current().handles
            before = num_elsewhere(1)
            # Not `ray.kill`: that says so first, and a successor may have the shard's place before it dies.
            os.kill(ray_cluster.get(handles[1].process.remote()).pid, signal.SIGKILL)
            wait_until(lambda: num_elsewhere(1) > before, "rows elsewhere")
            go_on(20)
            wait_until(lambda: shard_is_back(ray_cluster, experts, 1), "a successor")
            stopped = ray_cluster.get(handles[2].process.remote()).pid
            os.kill(stopped, signal.SIGSTOP)
            try:
                go_on(5)
            finally:
                os.kill(stopped, signal.SIGCONT)
            assert total("moecluster_dispatch_hedged_total", 2) > 0
    finally:
        experts.close()
