"""Messages of whole numbers between rank 0 and the others, over a group of torch.distributed. Knows no message."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import Unavailable

INLINE = 1024  # numbers of a message's first part: 8 KiB, a step that decodes some ten sequences


class Watch:
    """Whether all ranks live. lost: why nothing can be computed any more."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lost: Unavailable | None = None

    def check(self) -> None:
        """Raises Unavailable once a rank is gone."""
        if self.lost is not None:
            raise self.lost

    def do(self, work: Callable[[], Any]) -> None:
        """Calls it. Raises Unavailable where that shows that a rank is gone, and from then on."""
        self.check()
        try:
            work()
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            self.lost = Unavailable(f"a process of a model that {self.size} share is gone or silent: {reason}")
            raise self.lost from error


class Words:
    """Used by one thread. Every method blocks, and raises Unavailable once a rank is gone.

    links: a ProcessGroup.
    """

    def __init__(self, links: Any, watch: Watch) -> None:
        self._links, self._watch = links, watch

    def tell(self, numbers: np.ndarray) -> None:
        """Rank 0: gives int64 numbers to the others, which `hear` them."""
        self._give(numbers, lambda x: self._links.broadcast(x, 0))

    def hear(self) -> np.ndarray:
        """Waits for what rank 0 tells, however long that takes."""
        return self._take(lambda x: self._links.broadcast(x, 0))

    def answer(self, text: str) -> None:
        """To rank 0, which calls `answers`."""
        self._give(as_numbers(text), lambda x: self._links.send([x], 0, 0))

    def answers(self) -> list[str]:
        """Of the ranks from 1 on."""
        return [
            as_text(self._take(lambda x, rank=rank: self._links.recv([x], rank, 0)))  # type: ignore[misc]
            for rank in range(1, self._watch.size)
        ]

    def reduce(self, numbers: Tensor, options: Any) -> Tensor:
        """As torch.distributed's allreduce, of int64 numbers."""
        self._watch.do(lambda: self._links.allreduce([numbers], options).wait())
        return numbers

    def _give(self, numbers: np.ndarray, send: Callable[[Tensor], Any]) -> None:
        first = torch.zeros(INLINE, dtype=torch.int64)
        first[0] = len(numbers)
        room = min(len(numbers), INLINE - 1)
        first[1 : room + 1] = torch.from_numpy(numbers[:room])
        self._watch.do(lambda: send(first).wait())
        if len(numbers) > room:
            rest = torch.from_numpy(np.ascontiguousarray(numbers[room:]))
            self._watch.do(lambda: send(rest).wait())

    def _take(self, receive: Callable[[Tensor], Any]) -> np.ndarray:
        first = torch.zeros(INLINE, dtype=torch.int64)
        self._watch.do(lambda: receive(first).wait())
        count = int(first[0])
        found = first[1 : min(count, INLINE - 1) + 1]
        if count > len(found):
            rest = torch.empty(count - len(found), dtype=torch.int64)
            self._watch.do(lambda: receive(rest).wait())
            found = torch.cat([found, rest])
        return found.numpy()


def as_numbers(text: str) -> np.ndarray:
    """A number for each byte of its UTF-8."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def as_text(numbers: np.ndarray) -> str:
    return numbers.astype(np.uint8).tobytes().decode()
