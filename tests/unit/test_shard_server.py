"""An expert shard as its process serves it, and a spare process that becomes one. Without Ray."""

from dataclasses import replace

import pytest
import torch

from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.errors import ShardUnavailable
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import ExpertBatch
from cluster.metrics import ShardMetrics, new_registry
from cluster.runtime.workers import computing, shard_actor
from cluster.runtime.workers.protocol import NO_SHARD
from cluster.runtime.workers.rehearsal import Rehearsal
from cluster.runtime.workers.shard_actor import ExpertShardActor
from cluster.runtime.workers.shard_server import ShardServer
from cluster.tracing import products, settings
from cluster.tracing.contexts import Place, pack


@pytest.fixture
def registry():
    return new_registry()


@pytest.fixture
def server(registry):
    return ShardServer(3, ShardMetrics(registry, 3), Rehearsal())


def load(server, model_dir, experts, totals=None):
    def progress(total_bytes):
        if totals is not None:
            totals.append(total_bytes)

    return server.load(str(model_dir), experts, dtype="float32", device="cpu", progress=progress)


def batch(hidden_size, *, layer_id=0, rows=4):
    generator = torch.Generator().manual_seed(0)
    return ExpertBatch(
        layer_id=layer_id,
        epoch=1,
        hidden_states=torch.randn(rows, hidden_size, generator=generator),
        topk_ids=torch.arange(2 * rows).view(rows, 2) % 4,
        topk_weights=torch.full((rows, 2), 0.5),
    )


def test_it_computes_as_its_experts_do_and_counts(server, registry, demo_checkpoint):
    reader = open_checkpoint(demo_checkpoint)
    alone = ExpertShard(0, reader.config, dtype=torch.float32, device=torch.device("cpu"))
    alone.load(reader, {0: range(4)})
    load(server, demo_checkpoint, {0: range(4)})
    rows = batch(reader.config.hidden_size)
    expected = alone.forward(0, rows.hidden_states, rows.topk_ids, rows.topk_weights)
    torch.testing.assert_close(server.compute(rows, 0.25), expected)
    assert registry.get_sample_value("moecluster_shard_rows_total", {"shard_id": "3"}) == 4
    assert registry.get_sample_value("moecluster_shard_queue_wait_seconds_sum", {"shard_id": "3"}) == 0.25


def test_slots_count_for_their_experts_and_negative_ones_for_none(server, demo_checkpoint):
    hidden_size = open_checkpoint(demo_checkpoint).config.hidden_size
    shard = load(server, demo_checkpoint, {0: (5, 0, 3, 2)})
    rows = replace(batch(hidden_size, rows=3), topk_ids=torch.tensor([[0, 3], [-1, 2], [-7, 0]]))
    out = server.compute(rows, 0.0)
    assert shard.expert_tokens[0].tolist()[:6] == [2, 0, 1, 1, 0, 0]
    of_expert_2 = replace(rows.of_rows(slice(1, 2)), topk_ids=torch.tensor([[2, -1]]))
    torch.testing.assert_close(out[1:2], server.compute(of_expert_2, 0.0))
    nothing = replace(rows, topk_ids=torch.full((3, 2), -1))
    assert not server.compute(nothing, 0.0).any()


def test_an_expert_that_is_elsewhere_or_nowhere_is_named(server, demo_checkpoint):
    config = open_checkpoint(demo_checkpoint).config
    shard = load(server, demo_checkpoint, {0: (5, 0, 3, 2)})
    for expert_id in (1, 4, config.num_experts):
        rows = replace(batch(config.hidden_size, rows=1), topk_ids=torch.tensor([[3, expert_id]]))
        with pytest.raises(ShardUnavailable, match=f"shard 3 does not hold expert {expert_id} of layer 0"):
            server.compute(rows, 0.0)
    assert not shard.expert_tokens.any()


def test_before_its_first_load_it_is_unavailable(server, demo_checkpoint):
    hidden_size = open_checkpoint(demo_checkpoint).config.hidden_size
    assert server.loaded is None
    with pytest.raises(ShardUnavailable, match="shard 3 is loading"):
        server.compute(batch(hidden_size), 0.0)


def test_experts_that_are_here_are_not_read_again(server, demo_checkpoint):
    """Three experts, then two of them and two others: progress counts the bytes of three, then of two."""
    config = open_checkpoint(demo_checkpoint).config
    expert, totals = config.expert_bytes(config.dtype), []
    load(server, demo_checkpoint, {0: (0, 1, 2)}, totals)
    load(server, demo_checkpoint, {0: (1, 2), 1: (5, 6)}, totals)
    load(server, demo_checkpoint, {0: (1, 2), 1: (5, 6)}, totals)
    assert totals == [3 * expert, 2 * expert, 0]
    assert {i: layer.expert_ids for i, layer in server.loaded.layers.items()} == {0: (1, 2), 1: (5, 6)}


def test_a_load_without_memory_leaves_what_is_here(demo_checkpoint):
    rehearsal = Rehearsal()
    server = ShardServer(3, ShardMetrics(new_registry(), 3), rehearsal)
    load(server, demo_checkpoint, {0: (0, 1)})
    rehearsal.begin("no memory", 0.0, None)
    with pytest.raises(MemoryError):
        load(server, demo_checkpoint, {0: (2, 3)})
    assert server.shard().layers[0].expert_ids == (0, 1)


@pytest.fixture
def spare(monkeypatch):
    monkeypatch.setattr(shard_actor, "prepare_process", lambda: None)
    monkeypatch.setattr(computing, "prepare_to_compute", lambda num_threads: None)
    monkeypatch.setattr(shard_actor, "end_at_sigterm", lambda: None)
    return ExpertShardActor(NO_SHARD, 1)


def test_a_spare_process_is_no_shard_until_it_becomes_one(spare):
    spare.become(NO_SHARD)  # an older controller asks so whether it lives
    assert (spare.which(), spare.held(), spare.expert_tokens(), spare.stream_offer()) == (NO_SHARD, {}, None, None)
    with pytest.raises(ShardUnavailable, match="waits to become a shard"):
        spare.forward(0.0)
    spare.become(5)
    assert (spare.which(), spare.held()) == (5, {})
    with pytest.raises(ShardUnavailable, match="shard 5 is loading"):
        spare.forward(0.0)


def test_a_shard_that_can_send_no_traces_says_so_and_goes_on(server, monkeypatch, caplog):
    """Without the packages, and with variables that make no exporter."""
    config = ClusterConfig(model="m", tracing=True)
    with monkeypatch.context() as bare:
        bare.setattr(settings, "find_spec", lambda name: None)
        server.trace(config)
    assert "shard 3 sends no traces: tracing is true" in caplog.text
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    server.trace(config)
    server.tracing.computed(pack([Place(1, 2)]), 1, [(1, 0.0, 0.0)])
    monkeypatch.setattr(products, "QUIET_NS", 0)
    server._send_traces()
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'" in caplog.text
