"""A long run against a busy server waits for its turn, as long as the server says when that is."""

import math

import pytest

from cluster.client.patience import patient
from cluster.errors import Overloaded


class Server:
    """Refuses with these hints, then answers with the double."""

    def __init__(self, *hints: float) -> None:
        self._hints, self.now_s, self.slept = list(hints), 0.0, list[float]()

    def call(self, number: int) -> int:
        if self._hints:
            raise Overloaded("busy", self._hints.pop(0))
        return 2 * number

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def ask(server: Server) -> int:
    return patient(server.call, patience_s=10.0, clock=server.clock, sleep=server.sleep)(4)


def test_it_asks_again_when_the_server_says() -> None:
    server = Server(1.5, 4.0)
    assert ask(server) == 8
    assert server.slept == [1.5, 4.0]


@pytest.mark.parametrize(("hints", "slept"), [([4.0, 7.0], [4.0]), ([math.inf], [])])
def test_it_gives_up_where_that_is_too_late_or_never(hints: list[float], slept: list[float]) -> None:
    server = Server(*hints)
    with pytest.raises(Overloaded, match="busy"):
        ask(server)
    assert server.slept == slept
