"""The native loop of a shard's stream, against the shard itself: the same answers, the same counts, the same faults."""

import time
import weakref

import numpy as np
import pytest
import torch
from stream_tools import CPU, HERE, connect

from cluster.config.quantization import Quantization
from cluster.errors import ShardUnavailable
from cluster.experts.shard import LayerSlice
from cluster.experts.transport import ExpertBatch
from cluster.kernels.experts import no_experts
from cluster.kernels.native import library
from cluster.kernels.native.serving import can_serve
from cluster.stream.connection import StreamBroken
from cluster.stream.server import StreamServer
from cluster.stream.steady import STEADY

pytestmark = pytest.mark.skipif(library.native() is None or not can_serve(), reason="the native kernels are not built")

H, E, K = 40, 7, 3
HERE_IDS = {0: (1, 2, 4), 2: (0, 1, 2, 5, 6)}  # layer 1 has no experts


class Shard:
    """As much of an `ExpertShard` as the stream asks for. It computes with the plain operations."""

    def __init__(self, dtype=torch.bfloat16, quantization=None):
        self.dtype, self.quantization = dtype, quantization
        self.layers = {layer_id: self.slice(ids) for layer_id, ids in HERE_IDS.items()}
        self.expert_tokens = torch.zeros(3, E, dtype=torch.int64)

    def slice(self, ids):
        empty = no_experts(H, 24, dtype=self.dtype, device=CPU, quantization=self.quantization)
        weights = empty.rearranged([None] * len(ids))
        for weight in (*weights.gate_up, *weights.down):
            fill(weight)
        places = np.full(E + 1, -1)
        places[list(ids)] = range(len(ids))
        return LayerSlice(ids, torch.from_numpy(places[:-1]), places, weights)

    def forward(self, batch):
        layer = self.layers[batch.layer_id]
        places = layer.places[batch.topk_ids.numpy()]
        if ((places < 0) & (batch.topk_ids.numpy() >= 0)).any():
            raise ShardUnavailable("an expert is elsewhere", 0)
        out = layer.weights.forward(batch.hidden_states, torch.from_numpy(places), batch.topk_weights)
        return out.to(self.dtype)


def fill(weight):
    """A matrix, or one that is rounded when it settles."""
    if not weight.staging_bytes:
        weight.matrix.normal_(0, 0.3)
        return
    staging = torch.empty(weight.staging_bytes, dtype=torch.uint8)
    [target] = weight.targets({"weight": len(weight.matrix)}, staging).values()
    target.normal_(0, 0.3)
    weight.settle()


class Backend:
    """Counts the requests that Python and the loop answer."""

    device = CPU

    def __init__(self):
        self.shard, self.quiet = Shard(), True
        self.in_python, self.products, self.tokens = 0, [], torch.zeros(3, E, dtype=torch.int64)

    def forward(self, batch, waited_s):
        self.in_python += 1
        return self.shard.forward(batch)

    def experts(self):
        return self.shard if self.quiet else None

    def computed(self, products, tokens):
        self.products += products
        self.tokens += tokens


@pytest.fixture
def backend():
    torch.manual_seed(0)
    return Backend()


@pytest.fixture
def server(backend):
    made = StreamServer(backend, host="127.0.0.1", node=HERE, steady=backend, beat_s=0.05)
    made.start()
    yield made
    made.close()


def batch(rows=1, layer_id=0, ids=None, dtype=torch.bfloat16):
    allowed = torch.tensor([*(ids or HERE_IDS[layer_id]), -1])
    return ExpertBatch(
        layer_id=layer_id, epoch=5, hidden_states=torch.randn(rows, H).to(dtype),
        topk_ids=allowed[torch.randint(len(allowed), (rows, K))], topk_weights=torch.rand(rows, K),
    )  # fmt: skip


def ask(connection, sent):
    return connection.receive(connection.send(sent, 20.0), sent.hidden_states, 20.0).clone()


def warmed(server):
    """A caller whose requests the loop answers from now on."""
    connection = connect(server)
    for _ in range(STEADY):
        ask(connection, batch())
    return connection


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_answers_as_the_shard_does_and_tells_what_it_computed(server, backend):
    connection = warmed(server)
    sent = [batch(rows, layer_id) for rows in (1, 2, 5, 17, 63) for layer_id in HERE_IDS]
    for one in sent:
        torch.testing.assert_close(ask(connection, one), backend.shard.forward(one), rtol=0, atol=0)
    assert backend.in_python == STEADY
    until(lambda: len(backend.products) == len(sent))
    assert [rows for rows, _, _ in backend.products] == [len(one.topk_ids) for one in sent]
    assert all(0 <= waited_s < 20 and 0 < computed_s < 20 for _, waited_s, computed_s in backend.products)
    for layer_id in HERE_IDS:
        ids = torch.cat([one.topk_ids.flatten() for one in sent if one.layer_id == layer_id])
        assert backend.tokens[layer_id].tolist() == [int((ids == expert).sum()) for expert in range(E)]


def test_what_it_does_not_take_python_answers_and_the_loop_goes_on(server, backend):
    connection = warmed(server)
    large = batch(rows=200)
    torch.testing.assert_close(ask(connection, large), backend.shard.forward(large))
    with pytest.raises(ShardUnavailable, match="elsewhere"):
        ask(connection, batch(ids=(3,), rows=9))
    assert backend.in_python == STEADY + 2
    ask(connection, batch())
    assert backend.in_python == STEADY + 2
    assert backend.tokens[0, 3] == 0


def test_rounded_experts_are_computed_in_the_loop_however_many_they_are(server, backend):
    """Torch takes over at no number of rows. That number, times an even one of experts, was below zero in the loop."""
    backend.shard = Shard(quantization=Quantization(num_bits=8))
    backend.shard.layers[0] = backend.shard.slice((1, 4))
    connection = connect(server)
    for rows in (*[1] * STEADY, 2, 60):
        one = batch(rows, ids=(1, 4))
        torch.testing.assert_close(ask(connection, one), backend.shard.forward(one), rtol=0, atol=0)
    assert backend.in_python == STEADY


def test_several_requests_of_a_caller_wait_for_each_other(server, backend):
    connection = warmed(server)
    sent = [batch(rows=3, layer_id=layer_id) for layer_id in (0, 2, 0)]
    ids = [connection.send(one, 20.0) for one in sent]
    for request_id, one in zip(reversed(ids), reversed(sent), strict=True):
        got = connection.receive(request_id, one.hidden_states, 20.0)
        torch.testing.assert_close(got, backend.shard.forward(one), rtol=0, atol=0)
    assert backend.in_python == STEADY


def test_another_caller_is_answered_too(server, backend):
    first, second = warmed(server), connect(server)
    for _ in range(2 * STEADY):
        for connection in (first, second):
            one = batch(rows=2)
            torch.testing.assert_close(ask(connection, one), backend.shard.forward(one), rtol=0, atol=0)


def test_half_a_request_waits_for_the_rest(server, backend):
    connection = warmed(server)
    one = batch()
    whole = []
    connection._sock, real = Recorder(whole), connection._sock
    request_id = connection.send(one, 20.0)
    connection._sock = real
    [data] = whole
    real.sendall(data[:30])
    time.sleep(0.02)
    real.sendall(data[30:75])
    time.sleep(0.02)
    server.wake()  # with a part in the loop's buffer, which Python goes on with
    time.sleep(0.02)
    real.sendall(data[75:])
    got = connection.receive(request_id, one.hidden_states, 20.0)
    torch.testing.assert_close(got, backend.shard.forward(one), rtol=0, atol=0)


class Recorder:
    def __init__(self, whole):
        self.whole = whole

    def sendmsg(self, parts):
        self.whole.append(b"".join(parts))
        return len(self.whole[-1])


def test_a_damaged_request_ends_the_connection(server):
    connection = warmed(server)
    whole = []
    connection._sock, real = Recorder(whole), connection._sock
    one = batch()
    request_id = connection.send(one, 20.0)
    connection._sock = real
    real.sendall(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
    with pytest.raises(StreamBroken, match="checksum"):
        connection.receive(request_id, one.hidden_states, 20.0)


def test_a_cut_ends_the_connection(server):
    connection = warmed(server)
    server.cut()
    until(lambda: server.num_connections == 0)
    with pytest.raises(StreamBroken):
        ask(connection, batch())


def test_damage_reaches_the_next_answer(server):
    connection = warmed(server)
    server.damage()
    with pytest.raises(StreamBroken, match="checksum"):
        ask(connection, batch())


def test_a_caller_that_goes_is_forgotten(server):
    warmed(server).close()
    until(lambda: server.num_connections == 0)
    ask(connect(server), batch())


def test_closing_ends_the_loop(server):
    connection = warmed(server)
    ask(connection, batch())
    server.close()
    with pytest.raises(StreamBroken):
        ask(connection, batch())


def test_a_shard_that_has_other_work_for_a_request_answers_in_python(server, backend):
    connection = warmed(server)
    backend.quiet = False
    server.wake()
    ask(connection, batch())  # it may have been on its way into the loop
    before = backend.in_python
    ask(connection, batch())
    assert backend.in_python == before + 1


def test_new_experts_are_computed_and_old_ones_freed(server, backend):
    connection = warmed(server)
    ask(connection, batch())
    old = weakref.ref(backend.shard.layers[0].weights)
    backend.shard.layers[0] = backend.shard.slice((3, 4))
    until(lambda: old() is None)
    one = batch(ids=(3, 4), rows=4)
    torch.testing.assert_close(ask(connection, one), backend.shard.forward(one), rtol=0, atol=0)


def test_a_loop_that_waits_for_requests_counts_as_idle(server, backend):
    connection = warmed(server)
    ask(connection, batch())
    until(lambda: backend.products)
    assert not server._pulse.sign().busy


def test_halves_are_answered_in_python(server, backend):
    backend.shard = Shard(torch.float16)
    connection = connect(server)
    for _ in range(STEADY + 3):
        one = batch(rows=2, dtype=torch.float16)
        torch.testing.assert_close(ask(connection, one), backend.shard.forward(one), rtol=0, atol=0)
    assert backend.in_python == STEADY + 3
