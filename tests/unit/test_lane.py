"""One after the other, clients in turn, a bounded number waiting. The test says when a piece of work ends."""

import asyncio
import threading

import pytest

from cluster.errors import InvalidRequest, Overloaded
from cluster.serving.text.lane import Lane


class Job:
    """Work that goes on until it is let go; `begun` has the names of all in their order."""

    def __init__(self, begun, name):
        self.begun, self.name = begun, name
        self.may_end = threading.Event()

    def __call__(self):
        self.begun.append(self.name)
        self.may_end.wait()
        return self.name


def scenario(run, max_waiting=8):
    begun = []

    async def main():
        lane = Lane("inputs", max_waiting)
        jobs, tasks = {}, {}

        async def start(name, client=""):
            jobs[name] = Job(begun, name)
            tasks[name] = asyncio.create_task(lane.run(jobs[name], client))
            await asyncio.sleep(0)

        async def end(name):
            jobs[name].may_end.set()
            return await tasks[name]

        try:
            await run(lane, start, end, tasks)
        finally:
            for job in jobs.values():
                job.may_end.set()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert lane.num_waiting == 0
        assert await lane.run(lambda: "idle") == "idle"

    asyncio.run(main())
    return begun


def test_one_after_the_other_in_the_order_of_their_arrival():
    async def run(lane, start, end, tasks):
        for name in "abc":
            await start(name)
        assert lane.num_waiting == 2
        assert [await end(name) for name in "abc"] == ["a", "b", "c"]

    assert scenario(run) == ["a", "b", "c"]


def test_a_client_with_many_delays_anothers_first_by_one():
    async def run(lane, start, end, tasks):
        for name in ("g1", "g2", "g3", "g4"):
            await start(name, "greedy")
        await start("m1", "modest")
        for name in ("g1", "g2", "m1", "g3", "g4"):
            await end(name)

    assert scenario(run) == ["g1", "g2", "m1", "g3", "g4"]


def test_a_full_lane_refuses_and_says_when_to_come_again():
    async def run(lane, start, end, tasks):
        for name in ("a", "b", "c", "d"):
            await start(name)
        with pytest.raises(Overloaded, match=r"2 inputs wait already: try again in 1\.0 s"):
            await tasks["d"]

    scenario(run, max_waiting=2)


def test_in_a_full_lane_the_greediest_loses_its_latest_to_a_modest_one():
    async def run(lane, start, end, tasks):
        for name in ("g1", "g2", "g3"):
            await start(name, "greedy")
        await start("m1", "modest")
        with pytest.raises(Overloaded):
            await tasks["g3"]
        await start("m2", "modest")  # as many would wait as of the other: it is refused itself
        with pytest.raises(Overloaded):
            await tasks["m2"]
        assert [await end(name) for name in ("g1", "g2", "m1")] == ["g1", "g2", "m1"]

    scenario(run, max_waiting=2)


def test_where_none_may_wait_the_second_is_refused_while_the_first_runs():
    async def run(lane, start, end, tasks):
        await start("a")
        await start("b", "another")
        with pytest.raises(Overloaded):
            await tasks["b"]

    scenario(run, max_waiting=0)


def test_work_whose_caller_leaves_before_its_turn_is_not_done():
    async def run(lane, start, end, tasks):
        for name in "abc":
            await start(name)
        tasks["b"].cancel()
        await asyncio.wait([tasks["b"]])
        assert lane.num_waiting == 1
        await end("a")
        await end("c")

    assert scenario(run) == ["a", "c"]


def test_a_caller_that_leaves_when_its_turn_comes_hands_it_on():
    async def run(lane, start, end, tasks):
        for name in "abc":
            await start(name)
        lane._pass_on()  # as the end of "a" does; "b" has not run since
        tasks["b"].cancel()
        await asyncio.wait([tasks["b"]])
        await end("a")
        await end("c")

    assert scenario(run) == ["a", "c"]


def test_after_a_caller_that_leaves_the_next_one_waits_until_the_thread_is_free():
    async def run(lane, start, end, tasks):
        await start("a")
        await start("b")
        tasks["a"].cancel()
        await asyncio.wait([tasks["a"]])
        assert lane.num_waiting == 1

    assert scenario(run) == ["a", "b"]


def test_an_error_reaches_its_caller_and_the_next_one_runs():
    def fail():
        raise InvalidRequest("no", "text")

    async def run(lane, start, end, tasks):
        await start("a")
        failing = asyncio.create_task(lane.run(fail))
        await asyncio.sleep(0)
        await start("b")
        await end("a")
        with pytest.raises(InvalidRequest, match="no"):
            await failing
        await end("b")

    assert scenario(run) == ["a", "b"]
