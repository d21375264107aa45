"""The usual crossing in native code, against the dispatcher's own: the same sums, the same counts, the same faults."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_tools import CPU, HERE

from cluster.errors import ShardUnavailable
from cluster.experts.direct import MOST_ROWS, MOST_SLOTS, DirectFlight
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import PlacementPlan
from cluster.experts.transport import NOT_HERE
from cluster.metrics import DispatchMetrics, new_registry
from cluster.stream.client import StreamTransport
from cluster.stream.frames import Header, Kind
from cluster.stream.lanes import has_lanes
from cluster.stream.server import StreamServer

pytestmark = pytest.mark.skipif(not has_lanes(), reason="the native kernels are not built")

H, E, K, SHARDS = 24, 8, 3, 3
SLICES = ({0: (0, 3, 6), 1: (0, 1, 2, 3)}, {0: (1, 4, 7), 1: (4, 5)}, {0: (2, 5), 1: (6, 7)})
PLAN = PlacementPlan(epoch=1, num_experts=E, slices=SLICES)
SECONDS = ("round_trip_seconds_sum", "round_trip_seconds_bucket", "_created")


class Shard:
    """Multiplies rows by their experts' ids, waits at the gate before."""

    device = CPU

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.rows = []

    def forward(self, batch, waited_s):
        assert self.gate.wait(20)
        self.rows.append(len(batch.topk_ids))
        factors = torch.where(batch.topk_ids >= 0, (batch.topk_ids + 1) * batch.topk_weights, 0).sum(1, keepdim=True)
        return (batch.hidden_states.float() * factors).to(batch.hidden_states.dtype)


class Plans:
    def __init__(self, plan=PLAN):
        self.plan = plan

    def current(self):
        return self.plan

    def wait_beyond(self, epoch, timeout_s):
        return self.plan.epoch > epoch


class Cluster:
    """Shards with streams, and a transport to them. Each shard may have a successor."""

    def __init__(self, beat_s=0.05):
        self.beat_s = beat_s
        self.shards = [Shard() for _ in range(SHARDS)]
        self.servers = [self.serve(shard) for shard in self.shards]
        self.successions = 0
        self.transport = StreamTransport(self, node=HERE, fallback=None, timeout_s=20.0)

    def serve(self, shard):
        made = StreamServer(shard, host="127.0.0.1", node=HERE, beat_s=self.beat_s)
        made.start()
        return made

    def incarnation(self, shard_id):
        return self.servers[shard_id]

    def offer(self, shard_id):
        return self.servers[shard_id].offer

    def replace(self, shard_id):
        old, self.servers[shard_id] = self.servers[shard_id], self.serve(self.shards[shard_id])
        old.close()

    def dispatcher(self, plans=None, lanes=True, **options):
        registry = new_registry()
        made = ExpertDispatcher(
            self.transport, plans or Plans(), DispatchMetrics(registry, "test"),
            lanes=self.transport if lanes else None, **options,
        )  # fmt: skip
        return made, registry

    def close(self):
        for shard in self.shards:
            shard.gate.set()
        self.transport.close()
        for server in self.servers:
            server.close()


@pytest.fixture
def cluster():
    torch.manual_seed(0)
    made = Cluster()
    yield made
    made.close()


@pytest.fixture(scope="module")
def lasting():
    made = Cluster()
    yield made
    made.close()


def rows(num_rows, layer_id=0, dtype=torch.bfloat16, num_slots=K):
    return (
        layer_id,
        torch.randn(num_rows, H).to(dtype),
        torch.randint(NOT_HERE, E, (num_rows, num_slots)),
        torch.rand(num_rows, num_slots),
    )


def expected(sent):
    """By the dispatcher's definition, without any of it."""
    layer_id, x, ids, weights = sent
    total = torch.zeros(x.shape)
    for layers in SLICES:
        is_here = torch.isin(ids, torch.tensor(layers[layer_id]))
        if not is_here.any():
            continue
        factors = torch.where(is_here, (ids + 1) * weights, 0).sum(1, keepdim=True)
        total += torch.where(is_here.any(1, keepdim=True), (x.float() * factors).to(x.dtype).float(), 0)
    return total.to(x.dtype)


def crossed(dispatcher, sent, direct=True):
    flight = dispatcher.dispatch(*sent)
    assert isinstance(flight, DirectFlight) == direct
    return dispatcher.combine(flight)


def test_rows_of_spans_that_a_shard_has_not_heard_of_go_through_python(cluster, monkeypatch):
    dispatcher, _ = cluster.dispatcher()
    sent = rows(4)
    assert torch.equal(crossed(dispatcher, sent), expected(sent))
    with monkeypatch.context() as full:
        full.setattr("cluster.stream.connection.has_room", lambda sock: False)
        cluster.transport.trace(dict.fromkeys(range(SHARDS), bytes(24)))
    assert torch.equal(crossed(dispatcher, sent, direct=False), expected(sent))


def counts(registry):
    return {
        (sample.name, *sample.labels.items()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith(SECONDS)
    }


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, MOST_ROWS), layer_id=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), few=st.integers(1, E), seed=st.integers(0, 1 << 30),
    num_slots=st.sampled_from([K, MOST_SLOTS]),
)  # fmt: skip
def test_the_sums_and_counts_are_the_dispatchers_own(lasting, num_rows, layer_id, dtype, few, seed, num_slots):
    torch.manual_seed(seed)
    sent = rows(num_rows, layer_id, dtype, num_slots)
    sent[2].clamp_max_(few - 1)  # so that some shards get no row, or all
    results = []
    for lanes in (True, False):
        dispatcher, registry = lasting.dispatcher(lanes=lanes)
        out = crossed(dispatcher, sent, direct=lanes)
        torch.testing.assert_close(out, expected(sent), rtol=0, atol=0)
        dispatcher.account()
        results.append(counts(registry))
        lasting.transport.close()
        lasting.transport = StreamTransport(lasting, node=HERE, fallback=None, timeout_s=20.0)
    assert results[0] == results[1]
    assert any(key[0].endswith("_rows_total") for key in results[0]) == bool((sent[2] >= 0).any())


def test_not_finite_numbers_cross_as_they_are(cluster):
    dispatcher, _ = cluster.dispatcher()
    layer_id, x, ids, weights = rows(4)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -float("inf")
    ids[:] = torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        crossed(dispatcher, (layer_id, x, ids, weights)), expected((layer_id, x, ids, weights)), equal_nan=True
    )


def test_a_late_answer_is_waited_for_as_ever(cluster):
    dispatcher, registry = cluster.dispatcher()
    sent = rows(9)
    cluster.shards[1].gate.clear()
    threading.Timer(0.4, cluster.shards[1].gate.set).start()
    torch.testing.assert_close(crossed(dispatcher, sent), expected(sent), rtol=0, atol=0)
    assert [len(shard.rows) for shard in cluster.shards] == [1, 1, 1]
    dispatcher.account()
    returned = [registry.get_sample_value("moecluster_dispatch_round_trip_seconds_count",
                                          {"replica": "test", "shard_id": str(i)}) for i in range(SHARDS)]  # fmt: skip
    assert returned == [1, 1, 1]
    again = rows(5)
    torch.testing.assert_close(crossed(dispatcher, again), expected(again), rtol=0, atol=0)


def test_an_answer_that_is_late_without_a_sign_of_life_is_waited_for():
    """Longer than such answers take: then it is the dispatcher's own."""
    made = Cluster(beat_s=60.0)
    try:
        dispatcher, _ = made.dispatcher()
        sent = rows(9)
        crossed(dispatcher, sent)
        made.shards[1].gate.clear()
        flight = dispatcher.dispatch(*sent)
        threading.Timer(1.5, made.shards[1].gate.set).start()  # 1 s is waited for what is not known
        torch.testing.assert_close(dispatcher.combine(flight), expected(sent), rtol=0, atol=0)
        assert flight.legs is not None
        assert [len(shard.rows) for shard in made.shards] == [2, 2, 2]
    finally:
        made.close()


def test_a_shard_that_goes_meanwhile_is_replaced(cluster):
    plans = Plans()
    dispatcher, _ = cluster.dispatcher(plans)
    sent = rows(9)
    crossed(dispatcher, sent)
    cluster.shards[2].gate.clear()
    flight = dispatcher.dispatch(*sent)
    time.sleep(0.05)
    cluster.shards[2].gate.set()
    cluster.servers[2].cut()
    cluster.replace(2)
    plans.plan = PlacementPlan(epoch=2, num_experts=E, slices=SLICES)
    torch.testing.assert_close(dispatcher.combine(flight), expected(sent), rtol=0, atol=0)
    torch.testing.assert_close(dispatcher.combine(dispatcher.dispatch(*sent)), expected(sent), rtol=0, atol=0)


def test_a_shard_that_stays_away_fails_the_rows(cluster):
    dispatcher, _ = cluster.dispatcher(recovery_timeout_s=0.2)
    sent = rows(9)
    crossed(dispatcher, sent)
    cluster.servers[0].close()
    flight = dispatcher.dispatch(*sent)
    with pytest.raises(ShardUnavailable):
        dispatcher.combine(flight)


def test_a_damaged_answer_is_not_added(cluster):
    dispatcher, _ = cluster.dispatcher()
    sent = rows(9)
    crossed(dispatcher, sent)
    cluster.servers[1].damage()
    torch.testing.assert_close(dispatcher.combine(dispatcher.dispatch(*sent)), expected(sent), rtol=0, atol=0)


def test_signs_of_life_are_no_answers(cluster):
    dispatcher, _ = cluster.dispatcher()
    sent = rows(9)
    crossed(dispatcher, sent)
    cluster.shards[0].gate.clear()
    flight = dispatcher.dispatch(*sent)
    [peer] = cluster.servers[0]._callers.peers
    peer.sock.send(Header(kind=Kind.ALIVE).pack())
    cluster.shards[0].gate.set()
    torch.testing.assert_close(dispatcher.combine(flight), expected(sent), rtol=0, atol=0)


def test_rows_under_way_that_nobody_combines_disturb_nothing(cluster):
    dispatcher, _ = cluster.dispatcher()
    for _ in range(10):
        dispatcher.dispatch(*rows(3)).abandon()
        sent = rows(7)
        torch.testing.assert_close(dispatcher.combine(dispatcher.dispatch(*sent)), expected(sent), rtol=0, atol=0)


def test_two_crossings_at_a_time_keep_their_own_answers(cluster):
    dispatcher, _ = cluster.dispatcher()
    for sizes in ((3, 5), (3, MOST_ROWS + 1), (MOST_ROWS + 1, 3)):
        both = [rows(size) for size in sizes]
        flights = [dispatcher.dispatch(*sent) for sent in both]
        for flight, sent in zip(flights, both, strict=True):
            torch.testing.assert_close(dispatcher.combine(flight), expected(sent), rtol=0, atol=0)
    sent = rows(3)
    time.sleep(1.1)  # lanes are opened again
    torch.testing.assert_close(crossed(dispatcher, sent), expected(sent), rtol=0, atol=0)


def test_plans_with_copies_take_the_long_way(cluster):
    plan = PlacementPlan(epoch=2, num_experts=E, slices=({0: range(E)}, *SLICES))
    dispatcher, _ = cluster.dispatcher(Plans(plan))
    crossed(dispatcher, rows(2), direct=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shard_with_all_experts_gives_the_same_both_ways(cluster, dtype):
    """Rows without an expert are not sent, and are zero."""
    plans = Plans(PlacementPlan(epoch=2, num_experts=E, slices=({0: range(E)},)))
    sent = rows(40, dtype=dtype)
    sent[2][7:9] = NOT_HERE
    found = [crossed(cluster.dispatcher(plans, lanes=lanes)[0], sent, direct=lanes) for lanes in (True, False)]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0].any()
    assert not found[0][7:9].any()


def test_rows_beside_others_that_are_under_way_take_the_long_way(cluster):
    """Lanes stay open meanwhile."""
    dispatcher, _ = cluster.dispatcher()
    crossed(dispatcher, rows(3))
    for _ in range(3):
        both = [rows(size) for size in (3, 5)]
        flights = [dispatcher.dispatch(*sent, alone=False) for sent in both]
        assert not any(isinstance(flight, DirectFlight) for flight in flights)
        for flight, sent in zip(flights, both, strict=True):
            torch.testing.assert_close(dispatcher.combine(flight), expected(sent), rtol=0, atol=0)
        crossed(dispatcher, rows(3))


def test_rows_that_are_not_in_one_piece_take_the_long_way(cluster):
    dispatcher, _ = cluster.dispatcher()
    layer_id, x, ids, weights = rows(4)
    x = torch.randn(H, 4).to(torch.bfloat16).t()
    sent = layer_id, x, ids, weights
    torch.testing.assert_close(crossed(dispatcher, sent, direct=False), expected(sent), rtol=0, atol=0)
    wide = torch.randn(8, H).to(torch.bfloat16)[::2]  # pieces with others between them are fine
    sent = layer_id, wide, ids, weights
    torch.testing.assert_close(crossed(dispatcher, sent), expected(sent), rtol=0, atol=0)


def test_halves_take_the_long_way(cluster):
    dispatcher, _ = cluster.dispatcher()
    sent = rows(4, dtype=torch.float16)
    torch.testing.assert_close(crossed(dispatcher, sent, direct=False), expected(sent), rtol=0, atol=0)
