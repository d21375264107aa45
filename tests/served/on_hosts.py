"""Serves a model on a Ray of several hosts; shared by the programs that run there."""

import sys

import ray
from ray import serve
from ray.serve.config import gRPCOptions

from cluster.app import build
from cluster.chaos.traffic import make_questions
from cluster.runtime.names import APPLICATION, NAMESPACE
from cluster.runtime.start.application import GRPC_SERVICERS

ARGS = {
    "dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 << 20, "attention_replicas": 2, "expert_shards": 2,
    "drain_timeout_s": 10, "recovery_timeout_s": 60, "spare_processes": False,
}  # fmt: skip


def serve_model(address, model, **args):
    """With HTTP on port 8000 and gRPC on 9000 of every node; returns when it serves."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": "0.0.0.0", "port": 8000},
        grpc_options=gRPCOptions(port=9000, grpc_servicer_functions=GRPC_SERVICERS),
    )
    serve.run(build({"model": model, **ARGS, **args}), name=APPLICATION, route_prefix="/")


def questions_for(client):
    return make_questions(6, client.model_info().vocab_size, seed=3)


def print_line(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
