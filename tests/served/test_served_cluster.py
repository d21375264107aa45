"""The served application as a cluster: its GPUs, its growth, the deaths of its processes."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from served_tools import plasma_objects, samples, scrape, wait_until

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.names import NAMESPACE, controller_name

pytestmark = pytest.mark.ray


def greedy(max_tokens):
    return pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=max_tokens, ignore_eos=True)


def test_each_shard_and_each_replica_has_a_gpu_of_its_own(served):
    """Ray counts 16 logical GPUs here; two shards and two engines have four different ones, whole."""
    status = served.status()
    taken = [part.process.gpu_ids for part in (*status.shards, *status.replicas)]
    assert [len(gpu_ids) for gpu_ids in taken] == [1, 1, 1, 1]
    assert len({gpu_id for gpu_ids in taken for gpu_id in gpu_ids}) == 4


def shard_pids(served):
    return [shard.process.pid for shard in served.status().shards if shard.process]


def engine_pids(served):
    return [replica.process.pid for replica in served.status().replicas]


def test_the_object_store_does_not_grow_over_1000_requests(served, stub, ray_cluster):
    """As deployed: streams carry the rows, Serve the requests and answers. Rows over Ray: test_experts_on_ray.py."""
    before = plasma_objects(ray_cluster)

    def ask(index):
        ids = list(range(500)) if index % 8 == 0 else [index % 1000]
        return stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=greedy(1)))

    with ThreadPoolExecutor(24) as pool:
        assert sum(len(answer.token_ids) for answer in pool.map(ask, range(1000))) == 1000
    wait_until(lambda: plasma_objects(ray_cluster) <= before, f"the store has no more than {before} objects")
    assert scrape(served)["moecluster_engine_kv_used_blocks"] == 0


def test_metrics_tell_the_traffic_by_part(served, stub):
    stub.Generate(pb.GenerateRequest(text="count me", sampling_params=greedy(5)))  # the first one makes the series
    wait_until(lambda: "moecluster_expert_tokens_total" in scrape(served), "the experts' load arrives")
    before = scrape(served)
    stub.Generate(pb.GenerateRequest(text="count me", sampling_params=greedy(5)))
    wait_until(
        lambda: scrape(served)["moecluster_expert_tokens_total"] > before["moecluster_expert_tokens_total"],
        "the experts' load arrives",
    )
    after = scrape(served)
    assert after["moecluster_generated_tokens_total"] - before["moecluster_generated_tokens_total"] == 5
    assert after["moecluster_requests_total"] - before["moecluster_requests_total"] == 1
    for name in (
        "moecluster_prompt_tokens_total", "moecluster_time_to_first_token_seconds_count",
        "moecluster_inter_token_latency_seconds_count", "moecluster_request_duration_seconds_count",
        "moecluster_engine_step_seconds_count", "moecluster_dispatch_round_trip_seconds_count",
        "moecluster_dispatch_sent_bytes_total", "moecluster_shard_compute_seconds_count",
        "moecluster_shard_queue_wait_seconds_count",
    ):  # fmt: skip
        assert after[name] > before[name], name
    assert after["moecluster_controller_up_shards"] == 2
    assert after["moecluster_shard_weights_bytes"] == 4 * 64 * 24_576  # of a layer's experts, as `plan` has it
    assert after["moecluster_controller_plan_epoch"] >= 1


def test_a_killed_shard_costs_no_stream_and_no_token(served, stub):
    """Eight streams run while shard 1 is killed: their rows wait for the new process, their tokens stay the same."""
    request = pb.GenerateRequest(text="steady", sampling_params=greedy(150))
    expected = list(stub.Generate(request).token_ids)
    before = scrape(served)
    status = served.status()
    epoch, respawns = status.epoch, status.shards[1].respawns
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(stub.Generate, request) for _ in range(8)]
        wait_until(lambda: scrape(served)["moecluster_engine_running_sequences"] >= 8, "the streams run")
        os.kill(served.status().shards[1].process.pid, signal.SIGKILL)
        answers = [list(future.result(timeout=60).token_ids) for future in running]
    assert answers == [expected] * 8
    status = served.status()
    assert status.epoch > epoch
    assert status.shards[1].respawns == respawns + 1
    after = scrape(served)
    assert after["moecluster_controller_respawns_total"] - before.get("moecluster_controller_respawns_total", 0) == 1
    assert after["moecluster_dispatch_rerouted_rows_total"] > before["moecluster_dispatch_rerouted_rows_total"]
    assert after["moecluster_shard_rows_total"] > before["moecluster_shard_rows_total"]  # stays right across a restart
    assert after["moecluster_controller_up_shards"] == 2


def test_a_killed_controller_comes_back_to_the_running_shards(served, stub, ray_cluster):
    pids = shard_pids(served)
    controller = ray_cluster.get_actor(controller_name(served.group), namespace=NAMESPACE)
    ray_cluster.kill(controller, no_restart=False)
    assert len(stub.Generate(pb.GenerateRequest(text="go on", sampling_params=greedy(20))).token_ids) == 20

    def adopted():
        try:
            status = served.status()
            return shard_pids(served) == pids and status.covered and bool(status.metrics_addresses)
        except Exception:  # noqa: BLE001 it is restarting
            return False

    wait_until(adopted, "the controller has the same shards again")


def answer_of(call):
    """Token ids and text of a stream, its code if it fails."""
    token_ids, text = [], ""
    try:
        for piece in call:
            token_ids += piece.token_ids
            text += piece.text
    except grpc.RpcError as error:
        return token_ids, f"{error.code()}: {error.details()}"
    return token_ids, text


def test_streams_of_a_killed_attention_replica_go_on_without_a_gap(served, stub, ray_cluster):
    """Greedy and seeded ones; what the client sees is what it would have seen without the fault.

    Serve's process is killed, and its engine with it; the engine alone is in test_chaos.
    """
    asked = [
        pb.GenerateStreamRequest(
            text=f"story {i}",
            sampling_params=pb.SamplingParams(temperature=i % 2, seed=i, max_tokens=400, ignore_eos=True),
        )
        for i in range(6)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        expected = list(pool.map(lambda request: answer_of(stub.GenerateStream(request)), asked))

        def replayed():
            wait_until(lambda: len(engine_pids(served)) == 2, "the controller knows both engines")
            victim = attention_replica(ray_cluster, served.status().replicas[0].name)
            before = scrape(served).get("moecluster_request_replays_total", 0)
            calls = [stub.GenerateStream(request) for request in asked]
            for call in calls:
                next(call)
            rests = [pool.submit(answer_of, call) for call in calls]
            ray_cluster.kill(victim)
            for rest, whole in zip(rests, expected, strict=True):
                token_ids, text = rest.result()
                assert token_ids == whole[0][-len(token_ids) :]  # the first piece was read before the fault
                assert whole[1].endswith(text)
            return scrape(served)["moecluster_request_replays_total"] > before

        # On a busy machine the streams may have ended before the kill arrives.
        assert any(replayed() for _ in range(4))
    wait_until(lambda: len(engine_pids(served)) == 2, "a new engine")
    places = {sample.labels["replica"] for sample in samples(served) if "replica" in sample.labels}
    assert places <= {"0", "1", "2"}  # two and, where Serve is quicker than the controller, the dead one's
    assert {str(replica.process.slot) for replica in served.status().replicas} <= places


def attention_replica(ray_cluster, name):
    """The actor of Serve's replica of this name."""
    names = [actor["name"] for actor in ray_cluster.util.list_named_actors(all_namespaces=True)]
    [full_name] = [each for each in names if each.endswith(f"#{name}")]
    return ray_cluster.get_actor(full_name, namespace="serve")


@pytest.mark.slow
def test_killed_engines_leave_no_series_behind(served, stub):
    """A successor goes on with the slot of the dead one, or with the next where it is quicker than the news of a death.

    `test_slots.py` has 50 kills with the controller alone, and the files of real processes.
    """

    def names():
        return {(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples(served)}

    def kill_one():
        before = engine_pids(served)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(set(engine_pids(served)) - {before[0]}) == 2, "a new engine", timeout_s=90)
        stub.Generate(pb.GenerateRequest(text="x", sampling_params=greedy(4)), timeout=60)

    wait_until(lambda: len(engine_pids(served)) == 2, "the controller knows both engines")
    for _ in range(3):  # all slots that are ever used, each with every series
        kill_one()
    before = names()
    for _ in range(3):
        kill_one()
    places = {sample.labels["replica"] for sample in samples(served) if "replica" in sample.labels}
    assert places <= {"0", "1", "2"}
    assert len(names()) <= len(before) * 1.5, "a slot that comes late brings one replica's series at most"
