"""A program: serves a model on a Ray of several hosts, and asks it questions until it is killed.

Arguments: Ray's address, the model, the addresses of the fronts. It prints a line of JSON for each round of questions.
"""

import json
import sys
from contextlib import suppress

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray.serve.config import gRPCOptions

from cluster.app import build
from cluster.chaos.traffic import ask_all, make_questions
from cluster.client.grpc_client import Client
from cluster.errors import ClusterError
from cluster.runtime.names import APPLICATION, NAMESPACE
from cluster.runtime.operate import RunningCluster
from cluster.runtime.start.application import GRPC_SERVICERS

ARGS = {
    "dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 << 20, "attention_replicas": 2, "expert_shards": 2,
    "drain_timeout_s": 10, "recovery_timeout_s": 60, "spare_processes": False,
}  # fmt: skip


def says_that_it_serves(address):
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def main(address, model, *fronts):
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": "0.0.0.0", "port": 8000},
        grpc_options=gRPCOptions(port=9000, grpc_servicer_functions=GRPC_SERVICERS),
    )
    serve.run(build({"model": model, **ARGS}), name=APPLICATION, route_prefix="/")
    with Client("127.0.0.1:9000") as client, RunningCluster() as cluster:
        questions = make_questions(6, client.model_info().vocab_size, seed=3)
        quiet, status = ask_all(client, questions, concurrency=3), cluster.status()
        while True:
            replies = ask_all(client, questions, concurrency=3)
            with suppress(ClusterError):  # the controller moves, too
                status = cluster.status()
            shards, replicas = status.shards, status.replicas
            round_ = {
                "failed": [reply.error for reply in replies if reply.error],
                "different": sum(not reply.says_the_same(quiet[i]) for i, reply in enumerate(replies)),
                "nodes": {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]},
                "shards": [shard.node_id for shard in shards],
                "replicas": [replica.process.node_id for replica in replicas],
                "respawns": sum(shard.respawns for shard in shards),
                "fronts": [says_that_it_serves(front) for front in fronts],
            }
            sys.stdout.write(json.dumps(round_) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
