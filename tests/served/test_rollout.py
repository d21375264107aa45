"""Another version of this package rolled out under streams."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest
from next_version import VERSION, write_next_version
from ray import serve
from served_tools import beside, wait_until

import cluster as this_version
from cluster.chaos.traffic import ask_all, make_questions
from cluster.client.grpc_client import Client
from cluster.client.http_streams import HttpStreams
from cluster.runtime.names import APPLICATION
from cluster.runtime.operate import RunningCluster
from cluster.runtime.start.application import build_application

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]

NUM_QUESTIONS = 12


@pytest.fixture
def next_version(installed):
    """New processes have this version, as after an installation."""
    folder, before = installed.parent / "next", installed.readlink()
    assert write_next_version(folder) > 8
    turn(installed, folder)
    yield
    turn(installed, before)


def turn(installed, folder):
    turned = installed.parent / "turned"
    turned.symlink_to(folder)
    turned.rename(installed)


def roll_out(config, cluster):
    """As an operator does: `serve deploy` until every replica is new, then `moe-cluster roll`."""
    serve.run(build_application(config), name=APPLICATION, route_prefix="/", external_scaler_enabled=False)
    assert cluster.status().versions == (this_version.__version__, VERSION), "replicas are new, shards are not"
    cluster.roll()


@contextmanager
def replicas_watched():
    """Yields how many have run at each look, by Serve."""
    counts = []

    def look(ended):
        while not ended.wait(0.2):
            deployment = serve.status().applications[APPLICATION].deployments["AttentionReplica"]
            counts.append(deployment.replica_states.get("RUNNING", 0))

    with beside(look):
        yield counts


def ask_for_response(client, **fields):
    greedy = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}
    return client.responses.create(model="demo-moe", input="Which?", max_output_tokens=300, **greedy, **fields)


def once_ended(client, response_id):
    """It may wait for a place yet where the machine is busy."""
    wait_until(lambda: client.responses.retrieve(response_id).status not in ("queued", "in_progress"), "it ended")
    return client.responses.retrieve(response_id)


def test_another_version_rolls_out_under_streams_and_no_answer_changes(served_for_good, next_version):
    """Attention replicas, the ingress, the controller, shards and their number change while streams run; more streams
    than the new replicas have places for start a third one. They come over gRPC and HTTP in turn. Responses that run in
    the background of the old ingresses end there, and whatever is kept stays. With a surge new replicas run before old
    ones leave: there are never fewer.
    """
    with (
        Client(f"127.0.0.1:{served_for_good.grpc_port}") as client,
        RunningCluster() as cluster,
        openai.OpenAI(base_url=f"{served_for_good.http_url}/v1", api_key="any") as http,
    ):
        questions = make_questions(NUM_QUESTIONS, client.model_info().vocab_size, seed=3)
        quiet = ask_all(client, questions, concurrency=4)
        config = replace(
            served_for_good.config, release=VERSION, expert_shards=3, max_num_seqs=2, max_attention_replicas=3,
            max_surge_percent=100,
        )  # fmt: skip
        kept = ask_for_response(http)
        begun = [ask_for_response(http, background=True) for _ in range(4)]  # at both ingresses
        rolled = threading.Thread(target=roll_out, args=(config, cluster))
        rolled.start()
        rounds, askers = [], (client, HttpStreams(served_for_good.http_url))
        with replicas_watched() as counts:
            while rolled.is_alive() or len(cluster.status().shards) < 3 or len(cluster.status().replicas) < 3:
                rounds.append(ask_all(askers[len(rounds) % 2], questions, concurrency=8))
            rolled.join()
        assert min(counts) == 2
        assert cluster.status().versions == (VERSION,)
        assert http.responses.retrieve(kept.id) == kept
        for response in begun:
            ended = once_ended(http, response.id)
            assert (ended.status, ended.error, ended.output_text) == (kept.status, None, kept.output_text)
        cluster.scale_experts(2)  # as it was
    replies = [reply for again in rounds for reply in again]
    assert [reply.error for reply in replies if reply.error] == []
    assert all(reply.says_the_same(quiet[i % NUM_QUESTIONS]) for i, reply in enumerate(replies))
