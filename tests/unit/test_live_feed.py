"""Readings of a cluster become frames: shared by watchers, read only while there are any, with hand-made numbers."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import Unavailable
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.serving.live.beat import BeatMaker
from cluster.serving.live.events import Events
from cluster.serving.live.feed import LiveFeed
from cluster.serving.live.figures import FigureMeter, Latency, LinkFigures, quantile
from cluster.serving.live.picture import cluster_picture
from cluster.serving.live.public import public
from cluster.serving.live.reading import Reading
from cluster.status import ClusterStatus, Fault, ProcessInfo, ReplicaStatus, ShardStatus
from cluster.types import EngineStats

PLAN = plan_evenly((1, 3), 4, 2)  # two sparse layers, four experts: 0 and 1 on shard 0, 2 and 3 on shard 1


def process(pid, node="a"):
    return ProcessInfo(pid=pid, node_id=node, gpu_ids=(), version="1")


def stats(generated=0, at=0.0, **more):
    return EngineStats(
        running=1, waiting=2, used_blocks=5, num_blocks=20, generated_tokens=generated, at=at, block_size=16, **more
    )


def status(plan=PLAN, **more):
    shards = tuple(ShardStatus(shard_id=i, state="up", process=process(10 + i, "ab"[i % 2])) for i in range(2))
    replicas = (ReplicaStatus(name="r", process=process(20), engine=object(), asked_at=0.0, stats=stats()),)
    values = {
        "epoch": plan.epoch, "shards": shards, "replicas": replicas, "metrics_addresses": (), "draining": False,
        "plan": plan, "published": True, "target_shards": 2, "process": process(1),
    }  # fmt: skip
    return ClusterStatus(**(values | more))


def reading(at, first=0, second=0, **more):
    """Shard 0 has computed `first` tokens with expert 1 of layer 1, shard 1 `second` with expert 2 of layer 3."""
    counters = {(0, 10): np.array([[0, first, 0, 0], [0, 0, 0, 0]]), (1, 11): np.array([[0] * 4, [0, 0, second, 0]])}
    values = {"status": status(), "counters": counters, "stats": {"r": stats()}, "exposition": "", "at": at}
    return Reading(**(values | more))


class FakeSource:
    """Gives readings half a second apart, each with one more token; `failures` first."""

    def __init__(self, failures=0, error=None):
        self.failures, self.error, self.num_read = failures, error or Unavailable("no word"), 0

    async def read(self):
        self.num_read += 1
        if self.num_read <= self.failures:
            raise self.error
        return reading(0.5 * self.num_read, first=self.num_read)


def feed_of(source, **options):
    return LiveFeed(source, "tiny", period_s=0.001, wall_clock=lambda: 1000.0, **options)


async def take(feed, number):
    frames, taken = feed.frames(), []
    async for frame in frames:
        taken.append(frame)
        if len(taken) == number:
            break
    await frames.aclose()
    return taken


def test_a_frame_has_parts_placement_and_beat():
    frames = asyncio.run(take(feed_of(FakeSource()), 2))
    cluster, placement, beat = (json.loads(text) for text in (frames[1].cluster, frames[1].placement, frames[1].beat))
    assert (cluster["state"], cluster["model"], cluster["num_experts"]) == ("serving", "tiny", 4)
    assert [(shard["id"], shard["num_experts"], shard["process"]["node"]) for shard in cluster["shards"]] == [
        (0, 4, 1), (1, 4, 2),
    ]  # fmt: skip
    assert placement["layer_ids"] == [1, 3]
    assert placement["owners"][0] == [[0], [0], [1], [1]]
    assert (beat["seconds"], beat["tokens"]) == (0.5, [[0, 1, 0, 0], [0, 0, 0, 0]])


def test_nodes_that_leave_are_shown_with_the_change_under_way():
    nodes = (("b", 1.0, "no other node has room for shard 1"), ("c", 1.0, ""))
    picture = cluster_picture(status(work="rebalance", leaving=nodes), "tiny", ())
    assert picture.work == (
        "rebalance; Ray drains node 2: no other node has room for shard 1; Ray drains node without processes"
    )


def test_watchers_share_one_reader_that_ends_with_the_last_of_them():
    async def run():
        source = FakeSource()
        feed = feed_of(source)
        assert source.num_read == 0
        taken = await asyncio.gather(*(take(feed, 5) for _ in range(20)))
        assert all(taken[0][i] is frames[i] for frames in taken for i in range(5))
        assert feed.num_watchers == 0
        await asyncio.sleep(0.05)
        read = source.num_read
        assert read <= 10
        await asyncio.sleep(0.05)
        assert source.num_read == read  # nobody looks, nothing is read
        assert (await feed.now()).number == 1

    asyncio.run(run())


def test_a_slow_watcher_gets_the_latest_frame_and_no_queue():
    async def run():
        feed = feed_of(FakeSource())
        frames = feed.frames()
        first = await anext(frames)
        await asyncio.sleep(0.1)
        second = await anext(frames)
        assert second.number > first.number + 3
        await frames.aclose()

    asyncio.run(run())


def test_a_reading_that_fails_is_made_again(monkeypatch):
    assert asyncio.run(feed_of(FakeSource(failures=3)).now()).number == 4
    assert asyncio.run(feed_of(FakeSource(failures=2, error=IndexError("a shard of another model"))).now()).number == 3
    monkeypatch.setattr("cluster.serving.live.feed.FRAME_S", 0.05)
    with pytest.raises(Unavailable):
        asyncio.run(feed_of(FakeSource(failures=10**9)).now())


def test_a_beat_counts_tokens_since_the_last_reading_and_begins_anew_with_a_new_process():
    maker = BeatMaker()
    assert maker.beat(reading(10.0, first=100, second=100)).tokens is None
    beat = maker.beat(reading(12.0, first=104, second=112, status=status(imbalance=1.25)))
    assert beat.tokens == [[0, 4, 0, 0], [0, 0, 12, 0]]
    assert [(shard.id, shard.tokens_per_s, shard.share) for shard in beat.shards] == [(0, 2.0, 0.25), (1, 6.0, 0.75)]
    assert beat.imbalance == 1.25
    successor = {(0, 99): np.array([[0, 50, 0, 0], [0] * 4]), (1, 11): np.array([[0] * 4, [0, 0, 113, 0]])}
    assert maker.beat(reading(13.0, counters=successor)).tokens == [[0, 0, 0, 0], [0, 0, 1, 0]]


def test_a_beat_has_the_rate_of_tokens_by_the_engines_own_clock():
    maker = BeatMaker()
    maker.beat(reading(0.0, stats={"r": stats(100, 50.0)}))
    beat = maker.beat(reading(1.0, stats={"r": stats(130, 52.0)}))
    assert (beat.tokens_per_s, beat.replicas[0].used, beat.replicas[0].cache_tokens) == (15.0, 0.25, 320)


def test_events_tell_faults_moves_and_parts_that_come_and_go():
    events = Events()
    events.observe(status(), 1.0)
    lost = (replace(status().shards[0], state="lost"), status().shards[1])
    events.observe(status(shards=lost, faults=(Fault(at=2.0, what="shard 0 died"),)), 3.0)
    moved = PlacementPlan(epoch=5, num_experts=4, slices=({1: (0, 2), 3: (0, 1, 2)}, {1: (1, 3), 3: (2, 3)}))
    events.observe(status(moved, faults=(Fault(at=2.0, what="shard 0 died"),), work="rebalance"), 4.0)
    events.observe(status(moved, shards=status().shards[:1], work="rebalance"), 5.0)
    assert [(event.kind, event.text) for event in events.latest] == [
        ("fault", "shard 0 died"),
        ("up", "shard 0 is up"),
        ("change", "rebalance"),
        ("move", "1 expert moved from shard 0 to shard 1"),
        ("move", "1 expert moved from shard 1 to shard 0"),
        ("move", "1 expert copied to shard 0"),
        ("change", "shard 1 is gone"),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("failed: no file /srv/models/a.safetensors here", "failed: no file … here"),
        ("no room in /data", "no room in …"),
        ("cannot read '/srv/my models/a b.bin': no such file", "cannot read '…': no such file"),
        ("~/models/x, ./x/y and ../z", "… … and …"),
        ('File "/usr/lib/ray/worker.py", line 3', 'File "…", line 3'),
        ("models/tiny/a.bin and tiny/model.safetensors", "… and …"),
        ("cannot reach 10.1.2.3:6379 nor node-7.example:8000", "cannot reach … nor …"),
        ("Connect call failed ('10.0.0.1', 80)", "Connect call failed ('…', 80)"),
        ("[fe80::1%eth0]:80, ::1 and 2001:db8::7", "…, … and …"),
        ("ray::ExpertShard.load() (pid=7, ip=10.0.0.9)", "ray::ExpertShard.load() (pid=7, ip=…)"),
        ("host ip-10-0-0-7.ec2.internal is away", "host … is away"),
        ("no answer from gpu3.cluster.local", "no answer from …"),
        ("https://user:pw@hub.example/x?token=abc is away", "… is away"),
        ("401 with hf_AbCdEfGhIjKlMnOp and Bearer abc.def", "401 with … and …"),
        ("api_key='abc', token: xyz", "…, …"),
        ("actor 3f2b9c0d4e5f60718293a4b5c6d7e8f9 died", "actor … died"),
        ("two\n  lines", "two lines"),
    ],
)
def test_a_watcher_reads_no_path_no_address_and_no_token(text, shown):
    assert public(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "shard 0 died",
        "rebalance: loading on shard 1 (1 of 2)",
        "add shard 3: 12 experts moved, imbalance 1.40 -> 1.02",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "shard 1 has model.layers.3.mlp.experts.7.gate_proj.weight of version 2.11.0+cu128",
        "Qwen/Qwen1.5-MoE-A2.7B-Chat makes 5.4 tokens/s and/or less",
        "a second copy is needed: add one with --min-copies 2",
    ],
)
def test_a_watcher_reads_plain_reasons_as_they_are(text):
    assert public(text) == text


def test_a_long_reason_is_cut_and_costs_no_more_than_its_length():
    for text in ("a-" * 10**6, "1." * 10**6, "a/" * 10**6, "a:" * 10**6, "f" * 10**6, "a." * 10**6):
        assert len(public(text)) <= 240


def test_all_texts_of_a_picture_and_its_events_are_public():
    fault = Fault(at=2.0, what="shard 0 failed at 10.0.0.1:80")
    failing = status(failure="cannot read /srv/models/a", work="add shard 2: waits for 10.0.0.1:80", faults=(fault,))
    events = Events()
    events.observe(status(), 1.0)
    events.observe(failing, 3.0)
    assert [event.text for event in events.latest] == ["shard 0 failed at …", "add shard 2: waits for …"]
    failed = cluster_picture(failing, "tiny", events.latest)
    assert (failed.state, failed.reason, failed.work) == ("failed", "cannot read …", "add shard 2: waits for …")


SCRAPE = """moecluster_time_to_first_token_seconds_bucket{{le="0.1"}} {a}
moecluster_time_to_first_token_seconds_bucket{{le="0.5"}} {b}
moecluster_time_to_first_token_seconds_bucket{{le="+Inf"}} {b}
moecluster_dispatch_round_trip_seconds_sum{{replica="0",shard_id="1"}} {wait}
moecluster_dispatch_round_trip_seconds_count{{replica="0",shard_id="1"}} {batches}
moecluster_dispatch_rows_total{{replica="0",shard_id="1"}} {rows}
moecluster_shard_compute_seconds_sum{{shard_id="1"}} {compute}
moecluster_shard_weights_bytes{{shard_id="1"}} 4096.0
moecluster_time_to_first_token_seconds_created 1.0
"""


def test_figures_between_two_scrapes():
    """In 2 s: 10 first tokens, all between 0.1 and 0.5 s, so half of them within 0.3; 20 batches of 100 rows together,
    0.04 s each on the way: 50 rows/s, of which 2 are on the way at a time; 0.5 s of computing."""
    meter = FigureMeter()
    assert meter.observe(SCRAPE.format(a=5, b=5, wait=1.0, batches=10, rows=1000, compute=3.0), 0.0) is None
    figures = meter.observe(SCRAPE.format(a=5, b=15, wait=1.8, batches=30, rows=1100, compute=3.5), 2.0)
    assert figures.first_token == Latency(p50=0.3, p95=0.48)
    assert figures.between_tokens == Latency()
    [shard] = figures.shards
    assert (shard.id, shard.rows_per_s, shard.in_flight, shard.busy, shard.bytes) == (1, 50.0, 2.0, 0.25, 4096)
    assert figures.links == (LinkFigures(replica="0", shard=1, rows_per_s=50.0),)


def test_a_quantile_of_the_last_bucket_is_its_lower_bound():
    assert quantile([0.1, float("inf")], [0, 7], 0.5) == 0.1
    assert quantile([0.1, float("inf")], [0, 0], 0.5) is None
