"""The ranks of a divided model as threads of the test's process, joined by gloo as processes are."""

import tempfile
import threading
from pathlib import Path

import numpy as np

from cluster.engine.follower import LoadedRank
from cluster.engine.group import Group
from cluster.engine.leader import STOP


class ThreadRanks:
    """As `ChildRanks`."""

    def __init__(self, model, config, *, on_cuda=False):
        self._size, self._folder = config.tensor_parallel_size, tempfile.TemporaryDirectory()
        self._meeting, self._group, self.failures = Path(self._folder.name) / "meeting", None, []
        self.ranks = [LoadedRank(str(model), config, rank) for rank in range(1, self._size)]
        self._threads = [
            threading.Thread(target=self._follow, args=(rank, loaded), daemon=True)
            for rank, loaded in enumerate(self.ranks, 1)
        ]

    def _follow(self, rank, loaded):
        try:
            loaded.follow(lambda device: Group(self._meeting, rank, self._size, device), 1)
        except Exception as error:  # noqa: BLE001 the test is to see it
            self.failures.append(error)

    def join(self, device):
        for thread in self._threads:
            thread.start()
        self._group = Group(self._meeting, 0, self._size, device)
        return self._group

    def close(self):
        if self._group is not None:
            self._group.tell(np.array([STOP]))
            self._group.changes.tell(np.empty(0, dtype=np.int64))
            for thread in self._threads:
                thread.join(10.0)
        self._folder.cleanup()
        assert self.failures == []
