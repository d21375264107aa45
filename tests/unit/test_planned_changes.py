"""The planner's simulation while processes die and replicas come and go."""

import random

import pytest

from cluster.errors import SetupError
from cluster.planning.changes import Failures, Scaling, let_fail, let_scale
from cluster.planning.engine import Limits
from cluster.planning.load import Lengths, OpenLoad, TraceLoad
from cluster.planning.simulation import ClusterModel, Simulation

LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_waiting=100, cache_tokens=100_000, block_size=16)


class Even:
    """10 ms a step, whatever it has."""

    def attention_s(self, work):
        return 0.010

    def shared_s(self, rows):
        return 0.0

    def shard_s(self, rows, num_shards, imbalance=1.0):
        return 0.0

    def crossing_s(self, rows, num_shards):
        return 0.0


def simulation(load, *, replicas=1, shards=0):
    return Simulation(ClusterModel(replicas=replicas, shards=shards, limits=LIMITS), Even(), load)


def test_nothing_dies_while_no_process_lives():
    """Lives of 1 s, successors after 100 s: a lone replica dies once in 101 s on average, not each second. The last of
    1,000 requests comes after 10,000 s, by when 99 have died."""
    load = TraceLoad([(10.0 * number, 1, 1) for number in range(1000)])
    played = simulation(load)
    let_fail(played, Failures(mean_s=1.0, recovery_s=100.0), most_replicas=1)
    record = played.run()
    assert len(record.whole_s) == 1000
    assert record.failures == pytest.approx(99, rel=0.1)


def test_a_dead_shard_does_not_die_again():
    """In 10,000 s a replica that is never gone dies 200 times, and a shard that is gone for as long as it lives 100."""
    played = simulation(TraceLoad([(10.0 * number, 1, 1) for number in range(1000)]), shards=1)
    played.kill_replica = lambda *_: None
    let_fail(played, Failures(mean_s=50.0, recovery_s=50.0), most_replicas=1)
    assert played.run().failures == pytest.approx(300, rel=0.15)


@pytest.mark.parametrize("shards", [0, 2])
def test_processes_that_die_before_an_answer_end_the_simulation(shards):
    """An answer takes 10 s, a life 1 ms."""
    played = simulation(TraceLoad([(0.0, 1, 1000)]), shards=shards)
    let_fail(played, Failures(mean_s=0.001, recovery_s=0.001), most_replicas=1)
    with pytest.raises(SetupError, match=r"--mean-life 0.001 lets processes die over 100,000 times"):
        played.run()


def steady(num_requests=200):
    return OpenLoad(Lengths(prompt_tokens=8, output_tokens=20), rate=20.0, num_requests=num_requests)


def test_a_replica_that_leaves_ends_its_requests_and_takes_no_new_ones():
    """It goes within the 0.2 s and some that an answer takes, and all are answered."""
    played, numbers = simulation(steady(), replicas=2), []
    played.after(2.0, lambda _: played.retire_replica(), None)
    for moment in (1.9, 2.5):
        played.after(moment, lambda _: numbers.append(played.num_replicas), None)
    assert len(played.run().whole_s) == 200
    assert numbers == [2, 1]


def test_requests_wait_for_a_replica_that_stays_where_the_others_leave():
    """Two live, one leaves with requests, the other dies: the next one comes after 1 s, and takes all."""
    played = simulation(steady(), replicas=2)

    def change(_):
        played.retire_replica()
        [staying] = played.staying_models()
        while staying in played.staying_models():
            played.kill_replica(random.Random(1), 1.0)

    played.after(2.0, change, None)
    record = played.run()
    assert len(record.whole_s) == 200
    assert max(record.first_token_s) > 0.9


def test_a_leaving_replica_that_dies_has_no_successor():
    """Both die with requests; one was to stay."""
    played, numbers = simulation(steady(), replicas=2), []
    played.after(2.0, lambda _: played.retire_replica(), None)
    for moment in (2.001, 2.002):
        played.after(moment, lambda _: played.kill_replica(random.Random(0), 0.5), None)
    for moment in (2.003, 6.0):
        played.after(moment, lambda _: numbers.append(played.num_replicas), None)
    assert len(played.run().whole_s) == 200
    assert numbers == [0, 1]


def test_replicas_are_never_more_than_asked_for_though_they_die():
    """One answers 40 requests/s at most: 8 at a time, 0.2 s each."""
    load = OpenLoad(Lengths(prompt_tokens=8, output_tokens=20), rate=100.0, num_requests=20_000)
    played = simulation(load)
    let_scale(played, Scaling(most=3, start_s=5.0))
    let_fail(played, Failures(mean_s=20.0, recovery_s=10.0), most_replicas=3)
    record = played.run()
    assert record.most_replicas == 3
    assert record.failures > 10
    assert len(record.whole_s) + record.refused == 20_000
