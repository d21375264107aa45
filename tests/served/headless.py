"""A program on a Ray of several hosts whose head may die. Its first argument says what it does:

- `serve RAY MODEL`: serves the model, and ends.
- `ask FRONT`: asks until it is killed, and knows nothing of Ray. It prints a line of JSON for each round of questions.
- `state RAY`: prints which processes there are.
"""

import json
import sys

from on_hosts import print_line, questions_for, serve_model

from cluster.chaos.traffic import ask_all
from cluster.client.grpc_client import Client
from cluster.runtime.operate import RunningCluster


def serve_and_end(address, model):
    serve_model(address, model, ingress_resource="moe_ingress")


def ask(front):
    with Client(front) as client:
        questions = questions_for(client)
        quiet = ask_all(client, questions, concurrency=3)
        while True:
            replies = ask_all(client, questions, concurrency=3)
            round_ = {
                "failed": [reply.error for reply in replies if reply.error],
                "different": sum(not reply.says_the_same(quiet[i]) for i, reply in enumerate(replies)),
                "answered": len(replies),
                "waits_s": [reply.arrivals[1] - reply.arrivals[0] for reply in replies if len(reply.arrivals) > 1],
            }
            print_line(json.dumps(round_))


def print_state(address):
    with RunningCluster(address) as cluster:
        status = cluster.status()
    state = {
        "controller": status.process.pid,
        "shards": {shard.process.pid: shard.state for shard in status.shards if shard.process is not None},
        "replicas": [replica.process.pid for replica in status.replicas],
    }
    print_line(json.dumps(state))


if __name__ == "__main__":
    {"serve": serve_and_end, "ask": ask, "state": print_state}[sys.argv[1]](*sys.argv[2:])
