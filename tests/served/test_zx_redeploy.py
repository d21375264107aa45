"""Another configuration rolled out under streams. Late in this folder: the cluster is another one afterwards."""

import threading
from dataclasses import replace

import pytest
from ray import serve

from cluster.chaos.traffic import ask_all, make_questions
from cluster.runtime.launch import build_application
from cluster.runtime.operate import APPLICATION, RunningCluster
from cluster.serving.client import Client

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

NUM_QUESTIONS = 12


def roll_out(config):
    """As `serve deploy` does, until every replica is a new one."""
    serve.run(build_application(config), name=APPLICATION, route_prefix="/", external_scaler_enabled=True)


def test_another_configuration_rolls_out_under_streams_and_no_answer_changes(served):
    """Attention replicas, the ingress and the number of shards change while streams run."""
    with Client(f"127.0.0.1:{served.grpc_port}") as client, RunningCluster() as cluster:
        questions = make_questions(NUM_QUESTIONS, client.model_info().vocab_size, seed=3)
        quiet = ask_all(client, questions, concurrency=4)
        before = {part.process.pid for part in cluster.parts() if part.role == "replica"}
        rolled = threading.Thread(target=roll_out, args=(replace(served.config, max_waiting=17, expert_shards=3),))
        rolled.start()
        rounds = []
        while rolled.is_alive() or len(cluster.status().shards) < 3:
            rounds.append(ask_all(client, questions, concurrency=4))
        rolled.join()
        after = {part.process.pid for part in cluster.parts() if part.role == "replica"}
        cluster.scale_experts(2)  # as it was
    assert not before & after
    replies = [reply for again in rounds for reply in again]
    assert [reply.error for reply in replies if reply.error] == []
    assert all(reply.says_the_same(quiet[i % NUM_QUESTIONS]) for i, reply in enumerate(replies))
