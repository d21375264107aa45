"""Several pieces of one call's work, a few of them at a time. Knows no HTTP."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

AT_A_TIME = 16  # of one call's inputs at the engine: more would leave other clients no room in its queue

Given = TypeVar("Given")
Made = TypeVar("Made")


async def a_few_at_a_time(
    work: Callable[[int, Given, bool], Awaitable[Made]], given: Sequence[Given], most: int
) -> list[Made]:
    """Returns what `work` makes of each index and input, in their order. Raises the first error, and ends the others.

    work: its last argument tells whether another input has ended for this one, as `goes_on` in Admission.
    given: at least one.  most: at a time, as admission lets one call have.
    """
    most = min(most, AT_A_TIME)
    made: dict[int, Made] = {}
    waiting = iter(enumerate(given))

    async def worker() -> None:
        for index, one in waiting:
            made[index] = await work(index, one, index >= most)

    workers = [asyncio.ensure_future(worker()) for _ in given[:most]]
    try:
        await asyncio.gather(*workers)
    finally:
        for each in workers:
            each.cancel()
        await asyncio.wait(workers)
    return [made[index] for index in range(len(given))]
