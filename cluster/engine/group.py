"""The processes among which one model is divided, joined by torch.distributed. Knows no model and no step.

gloo carries numbers of the CPU, over the loopback interface alone: a replica's ranks are on one machine. NCCL carries
those of GPUs. Sums on CPUs, two a layer, have a quicker way (`exchange.py`). All ranks call the same methods in the
same order.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from cluster.engine.exchange import Exchange
from cluster.errors import Unavailable

_dist: Any = torch.distributed  # its groups have no types

HOST, LOOPBACK = "127.0.0.1", "lo"
# Rank 0 waits so long for another one, whose part of a layer takes as long as its own. The others wait for rank 0,
# which may wait for experts, or for requests, as long as it takes: its end closes their connections.
PATIENCE_S = 30.0
FOREVER_S = 86400.0 * 365 * 10
INLINE = 1024  # numbers of a message's first part: 8 KiB, a step that decodes some ten sequences


class Group:
    """Used by one thread. Every method blocks; each raises Unavailable once a rank is gone, and then all of them do."""

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        """Blocks until all ranks are there, PATIENCE_S at most. meeting: a file, not there yet, in a folder of this
        user's alone, by which the ranks find each other; it is not needed any more then. Raises Unavailable."""
        self.rank, self.size, self.device = rank, size, device
        self.lost: Unavailable | None = None
        self._patience_s = FOREVER_S if rank else PATIENCE_S
        self._sums: Exchange | None = None
        try:
            if device.type == "cpu":
                self._sums = Exchange(meeting, rank, size, None if rank else PATIENCE_S)
            store = _dist.FileStore(str(meeting), size)
            self._rows = self._gloo(store, "rows") if device.type == "cpu" else self._nccl(store)
            self._words = self._gloo(store, "words")
            if self._sums is not None:
                self._sums.connect()
        except (RuntimeError, OSError) as error:
            raise Unavailable(f"rank {rank} of {size} does not reach the others: {error}") from error
        self.sum(torch.zeros(1, device=device))  # NCCL connects with its first call

    def sum(self, x: Tensor) -> Tensor:
        """Adds up the ranks' x, alike in shape and on the device, in place; returns it, the same bits at each rank."""
        x, sums = x.contiguous(), self._sums
        if sums is None:
            self._do(lambda: self._rows.allreduce([x]))
        else:
            self._guard(lambda: sums.sum(x))
        return x

    def share(self, x: Tensor) -> Tensor:
        """Gives rank 0's x, on the device, to all: written into theirs, alike in shape and dtype. Returns it."""
        x = x.contiguous()
        self._do(lambda: self._rows.broadcast(x, 0))
        return x

    def send(self, x: Tensor) -> None:
        """To rank 0, which calls `receive`."""
        x = x.contiguous()
        self._do(lambda: self._rows.send([x], 0, 0))

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """Writes what that rank sends into x, which is contiguous; returns it."""
        self._do(lambda: self._rows.recv([x], rank, 0))
        return x

    def least(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Each number's least value at any rank."""
        numbers = torch.tensor(counts, dtype=torch.int64)
        options = _dist.AllreduceOptions()
        options.reduceOp = _dist.ReduceOp.MIN
        self._do(lambda: self._words.allreduce([numbers], options))
        return tuple(numbers.tolist())

    def tell(self, numbers: np.ndarray) -> None:
        """Rank 0: gives int64 numbers to the others, which `hear` them."""
        first = torch.zeros(INLINE, dtype=torch.int64)
        first[0] = len(numbers)
        room = min(len(numbers), INLINE - 1)
        first[1 : room + 1] = torch.from_numpy(numbers[:room])
        self._do(lambda: self._words.broadcast(first, 0))
        if len(numbers) > room:
            rest = torch.from_numpy(np.ascontiguousarray(numbers[room:]))
            self._do(lambda: self._words.broadcast(rest, 0))

    def hear(self) -> np.ndarray:
        """Waits for what rank 0 tells, however long that takes."""
        first = torch.zeros(INLINE, dtype=torch.int64)
        self._do(lambda: self._words.broadcast(first, 0))
        count = int(first[0])
        found = first[1 : min(count, INLINE - 1) + 1]
        if count > len(found):
            rest = torch.empty(count - len(found), dtype=torch.int64)
            self._do(lambda: self._words.broadcast(rest, 0))
            found = torch.cat([found, rest])
        return found.numpy()

    def check(self) -> None:
        """Raises Unavailable once a rank is gone."""
        if self.lost is not None:
            raise self.lost

    def give_up(self, error: BaseException) -> None:
        """The ranks are no longer at the same call: nothing can be computed any more."""
        self.lost = self.lost or Unavailable(f"{self.size} processes that share a model are out of step: {error}")

    def _do(self, begin: Callable[[], Any]) -> None:
        self._guard(lambda: begin().wait())

    def _guard(self, work: Callable[[], Any]) -> None:
        self.check()
        try:
            work()
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            self.lost = Unavailable(f"a process of a model that {self.size} share is gone or silent: {reason}")
            raise self.lost from error

    def _gloo(self, store: Any, name: str) -> Any:
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = timedelta(seconds=self._patience_s)
        return _dist.ProcessGroupGloo(_dist.PrefixStore(name, store), self.rank, self.size, options)

    def _nccl(self, store: Any) -> Any:
        """NCCL's calls return when they are queued. Of a lost rank they raise later, or the device does."""
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._patience_s)
        return _dist.ProcessGroupNCCL(_dist.PrefixStore("rows", store), self.rank, self.size, options)
