"""A program: serves a model on a Ray of several hosts, and asks it questions until it is killed.

Arguments: Ray's address, the model, the addresses of the fronts. It prints a line of JSON for each round of questions.
"""

import json
import sys
from contextlib import suppress

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from on_hosts import print_line, questions_for, serve_model

from cluster.chaos.traffic import ask_all
from cluster.client.grpc_client import Client
from cluster.errors import ClusterError
from cluster.runtime.operate import RunningCluster


def says_that_it_serves(address):
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def main(address, model, *fronts):
    serve_model(address, model)
    with Client("127.0.0.1:9000") as client, RunningCluster() as cluster:
        questions = questions_for(client)
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
                "waits": [node.waits for node in status.leaving_nodes],
            }
            print_line(json.dumps(round_))


if __name__ == "__main__":
    main(*sys.argv[1:])
