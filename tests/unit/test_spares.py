"""Processes that wait to become a shard, one on each node. On processes that are none."""

import asyncio
from dataclasses import replace

import virtual_time
from control_fakes import CONFIG, LOAD_S, NODES, FakeCluster

SPARES = replace(CONFIG, spare_processes=True)


def spares_of(made):
    return [name for _, name in made.launcher.starts if name.startswith("g:spare-")]


def test_each_node_has_one_however_often_it_is_looked_after():
    async def play():
        made = FakeCluster(SPARES)
        for _ in range(3):
            await made.spares.keep([*NODES, "", "a"])
            await asyncio.sleep(1)
        assert len(spares_of(made)) == len(set(spares_of(made))) == 2

    virtual_time.run(play)


def test_one_that_died_is_replaced():
    async def play():
        made = FakeCluster(SPARES)
        await made.spares.keep(["a"])
        await asyncio.sleep(1)
        made.launcher.find(spares_of(made)[0]).die()
        await made.spares.keep(["a"])
        await made.spares.started("a")
        assert len(spares_of(made)) == 2

    virtual_time.run(play)


def test_where_shards_have_gpus_or_nobody_wants_them_there_is_none():
    async def play():
        for config in (replace(SPARES, gpus_per_expert_shard=1.0), CONFIG):
            made = FakeCluster(config)
            await made.spares.keep(NODES)
            await asyncio.sleep(1)
            assert spares_of(made) == []

    virtual_time.run(play)


def test_a_dead_shard_is_followed_by_its_nodes_spare_process_under_that_ones_name():
    async def play():
        made = await FakeCluster(SPARES).up()
        await made.spares.keep(NODES)
        await asyncio.sleep(1)
        starts = len(made.launcher.starts)
        [on_b] = [name for name, actor in made.launcher.named() if name.startswith("g:spare-") and actor.node_id == "b"]
        made.actor(1).die()
        await asyncio.sleep(LOAD_S + 0.1)
        assert (made.shards[1].status.actor, made.actor(1).shard_id) == (on_b, 1)
        assert len(made.launcher.starts) == starts, "no process had to start"
        events = [event[0] for event in made.launcher.log if event[1] in (on_b, 1)]
        assert events[-3:] == ["which", "become", "load"], "it is asked whether it lives before it becomes a shard"

    virtual_time.run(play)


def test_a_question_whether_one_lives_does_not_change_it():
    async def play():
        made = FakeCluster(SPARES)
        for _ in range(3):
            await made.spares.keep(["a"])
            await asyncio.sleep(1)
        assert {event[0] for event in made.launcher.log} == {"which"}
        assert made.launcher.find(spares_of(made)[0]).shard_id == -1

    virtual_time.run(play)


def test_one_that_died_is_not_taken():
    async def play():
        made = FakeCluster(SPARES)
        await made.spares.keep(["a"])
        await asyncio.sleep(1)
        made.launcher.find(spares_of(made)[0]).die()
        assert await made.spares.take("a", 0) is None
        assert await made.spares.take("b", 0) is None, "there was never one"

    virtual_time.run(play)


def test_one_that_does_not_answer_is_ended_and_a_process_starts_in_its_place():
    async def play():
        made = await FakeCluster(SPARES).up()
        await made.spares.keep(["a"])
        await asyncio.sleep(1)
        silent = made.launcher.find(spares_of(made)[0])
        silent.stopped = True
        made.actor(0).die()
        await asyncio.sleep(2 + LOAD_S + 0.1)  # two seconds for its answer
        assert silent.death.done()
        assert made.shards[0].status.actor == "g:shard-0"
        assert made.shards.all_up()

    virtual_time.run(play)


def test_all_are_ended_before_a_roll_whose_spares_are_of_the_next_version():
    async def play():
        made = FakeCluster(SPARES)
        await made.spares.keep(NODES)
        await made.spares.clear()
        assert made.launcher.named() == []
        await made.spares.keep(["a"])
        await made.spares.started("a")
        assert len(made.launcher.named()) == 1

    virtual_time.run(play)
