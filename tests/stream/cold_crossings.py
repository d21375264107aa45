"""CPU time of crossings behind weights that no cache holds: one sparse layer of Qwen1.5-MoE-A2.7B's shapes again and
again, its experts in two other processes, and as many bytes read between two crossings as attention has weights.

    python tests/stream/cold_crossings.py --rows 1,8 --ways local,python,native --repeat 3

On a busy machine its milliseconds of CPU time say more than those of the wall. bfloat16, the ways in turns.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch

from cluster.config import MoeConfig
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import PlacementPlan
from cluster.experts.routing import FixedPlan
from cluster.experts.shard import ExpertShard, LayerSlice
from cluster.experts.transport import ExpertTransport, LocalTransport
from cluster.kernels.native.library import native
from cluster.kernels.weights import weight_maker
from cluster.metrics import DispatchMetrics, ShardMetrics, new_registry
from cluster.model.layers.moe import SparseMoe
from cluster.runtime.workers.rehearsal import Rehearsal
from cluster.runtime.workers.shard_server import ShardServer
from cluster.stream.client import StreamTransport
from cluster.stream.server import StreamServer

HIDDEN, NUM_EXPERTS, TOPK, OTHER_BYTES = 2048, 60, 4, 33 << 20
CPU, HERE, DTYPE = torch.device("cpu"), "this host", torch.bfloat16
MOE = MoeConfig(
    num_experts=NUM_EXPERTS, num_experts_per_tok=TOPK, moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632, norm_topk_prob=False, sparse_layers=(0,),
)  # fmt: skip


@dataclass
class OneLayer:
    hidden_size: int = HIDDEN
    num_hidden_layers: int = 1
    num_experts: int = NUM_EXPERTS
    moe: MoeConfig = MOE


def shard(shard_id, ids):
    """With random experts, none of them read from a file."""
    made = ExpertShard(shard_id, OneLayer(), dtype=DTYPE, device=CPU)
    weights = made._no_experts.rearranged([None] * len(ids))
    for weight in (*weights.gate_up, *weights.down):
        weight.matrix.view(torch.int16).fill_(0x3C80)  # 0.0156
    places = np.full(NUM_EXPERTS + 1, -1)
    places[list(ids)] = range(len(ids))
    made.layers[0] = LayerSlice(tuple(ids), torch.from_numpy(places[:-1]), places, weights)
    return made


def serve(shard_id, steady, pipe: Connection):
    torch.set_num_threads(1)
    served = ShardServer(shard_id, ShardMetrics(new_registry(), shard_id), Rehearsal())
    served._shard = shard(shard_id, range(shard_id, NUM_EXPERTS, 2))

    class Backend:
        device, forward = CPU, served.compute

    server = StreamServer(Backend(), host="127.0.0.1", node=HERE, steady=served if steady else None)
    server.start()
    pipe.send(server.offer)
    while pipe.recv():
        pipe.send(time.process_time())
    server.close()


class Offers:
    def __init__(self, offers):
        self.offers = offers

    def incarnation(self, shard_id):
        return shard_id

    def offer(self, shard_id):
        return self.offers[shard_id]


def layer():
    made = SparseMoe(MOE, HIDDEN, 0)
    made.gate.weight = torch.nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN).mul_(0.05).to(DTYPE), requires_grad=False)
    shared = made.shared_expert
    for linear in (shared.gate_up_proj, shared.down_proj, made.shared_expert_gate):
        linear.allocate(weight_maker(DTYPE, CPU), dtype=DTYPE, device=CPU)
        linear.weight.matrix.normal_(0, 0.02)
    return made


def measure(way, num_rows, num_crossings):
    """Milliseconds a crossing: wall, and CPU of the attention process and of each shard."""
    torch.manual_seed(0)
    num_shards = 1 if way == "local" else 2
    plan = PlacementPlan(
        epoch=1, num_experts=NUM_EXPERTS,
        slices=tuple({0: tuple(range(i, NUM_EXPERTS, num_shards))} for i in range(num_shards)),
    )  # fmt: skip
    pipes: list[Connection] = []
    transport: ExpertTransport
    if way == "local":
        transport = LocalTransport({0: shard(0, range(NUM_EXPERTS))})
    else:
        context = multiprocessing.get_context("spawn")
        for i in range(num_shards):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(i, way == "native", theirs), daemon=True).start()
            pipes.append(ours)
        transport = StreamTransport(Offers([pipe.recv() for pipe in pipes]), node=HERE, fallback=None, timeout_s=30.0)
    metrics = DispatchMetrics(new_registry(), "bench")
    experts = ExpertDispatcher(transport, FixedPlan(plan), metrics, lanes=transport if way == "native" else None)
    sparse, other = layer(), torch.ones(OTHER_BYTES, dtype=torch.uint8)
    rows = torch.randn(64, num_rows, HIDDEN).to(DTYPE)

    def cpu():
        for pipe in pipes:
            pipe.send(True)
        return np.array([time.process_time(), *(pipe.recv() for pipe in pipes)])

    seconds = []
    for i in range(64 + num_crossings):
        if i == 64:
            before = cpu()
        began = time.perf_counter()
        sparse.begin(rows[i % 64], experts)()
        native().read(other.data_ptr(), OTHER_BYTES, torch.get_num_threads())
        experts.account()
        seconds.append(time.perf_counter() - began)
    used = (cpu() - before) / num_crossings * 1000
    for pipe in pipes:
        pipe.send(False)
    transport.close()
    return median(seconds[64:]) * 1000, used


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--ways", default="local,python,native")
    parser.add_argument("--crossings", type=int, default=150)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp())
    print("rows way     wall  CPU ms in all: attention, shards")  # noqa: T201
    for num_rows in map(int, args.rows.split(",")):
        for _ in range(args.repeat):
            for way in args.ways.split(","):
                with torch.inference_mode():
                    wall, used = measure(way, num_rows, args.crossings)
                each = " ".join(f"{one:.2f}" for one in used)
                print(f"{num_rows:4} {way:7} {wall:5.2f} {used.sum():5.2f}: {each}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
