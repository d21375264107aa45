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
from cluster.engine.words import Watch, Words
from cluster.errors import Unavailable

_dist: Any = torch.distributed  # its groups have no types

HOST, LOOPBACK = "127.0.0.1", "lo"
# Rank 0 waits so long for another one, whose part of a layer takes as long as its own. The others wait for rank 0,
# which may wait for experts, or for requests, as long as it takes: its end closes their connections.
PATIENCE_S = 30.0
FOREVER_S = 86400.0 * 365 * 10
CHANGE_PATIENCE_S = 600.0  # for another rank to read its part of an adapter: gigabytes from a slow disk


class Group:
    """Used by one thread. Every method blocks; each raises Unavailable once a rank is gone, and then all of them do.

    changes: messages beside the steps, which one more thread may use meanwhile.
    """

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        """Blocks until all ranks are there, PATIENCE_S at most. meeting: a file, not there yet, in a folder of this
        user's alone, by which the ranks find each other; it is not needed any more then. Raises Unavailable."""
        self.rank, self.size, self.device = rank, size, device
        self._watch = Watch(size)
        self._patience_s = FOREVER_S if rank else PATIENCE_S
        self._sums: Exchange | None = None
        try:
            if device.type == "cpu":
                self._sums = Exchange(meeting, rank, size, None if rank else PATIENCE_S)
            store = _dist.FileStore(str(meeting), size)
            self._rows = self._gloo(store, "rows", self._patience_s) if device.type == "cpu" else self._nccl(store)
            self._words = Words(self._gloo(store, "words", self._patience_s), self._watch)
            patience_s = FOREVER_S if rank else CHANGE_PATIENCE_S
            self.changes = Words(self._gloo(store, "changes", patience_s), self._watch)
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
            self._watch.do(lambda: sums.sum(x))
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
        return tuple(self._words.reduce(numbers, options).tolist())

    def tell(self, numbers: np.ndarray) -> None:
        """As `Words.tell`, of steps."""
        self._words.tell(numbers)

    def hear(self) -> np.ndarray:
        """As `Words.hear`, of steps."""
        return self._words.hear()

    @property
    def lost(self) -> Unavailable | None:
        """Why nothing can be computed any more."""
        return self._watch.lost

    def check(self) -> None:
        """Raises Unavailable once a rank is gone."""
        self._watch.check()

    def give_up(self, error: BaseException) -> None:
        """The ranks are no longer at the same call: nothing can be computed any more."""
        of_size = f"{self.size} processes that share a model"
        self._watch.lost = self.lost or Unavailable(f"{of_size} are out of step: {error}")

    def _do(self, begin: Callable[[], Any]) -> None:
        self._watch.do(lambda: begin().wait())

    def _gloo(self, store: Any, name: str, patience_s: float) -> Any:
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = timedelta(seconds=patience_s)
        return _dist.ProcessGroupGloo(_dist.PrefixStore(name, store), self.rank, self.size, options)

    def _nccl(self, store: Any) -> Any:
        """NCCL's calls return when they are queued. Of a lost rank they raise later, or the device does."""
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._patience_s)
        return _dist.ProcessGroupNCCL(_dist.PrefixStore("rows", store), self.rank, self.size, options)
