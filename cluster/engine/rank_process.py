"""The ranks from 1 on as children of rank 0's process, for an `LLM`. On a cluster they are actors.

A child reads from its stdin what to load, then where the ranks meet; that pipe's end ends it. On its stdout it tells
once that it has its weights, or why not.
"""

import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from cluster.config import EngineConfig
from cluster.config.environment import MEMORY_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.config.tensor_parallel import FIELD
from cluster.engine.follower import LoadedRank
from cluster.engine.group import Group
from cluster.errors import CheckpointError, ClusterError, SetupError, Unavailable

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """For a child, to load. num_threads: of its products."""

    model: str
    config: EngineConfig
    rank: int
    num_threads: int


class ChildRanks:
    """The `OtherRanks` of an `LLM`. Close it: that ends the children, as does the end of this process."""

    def __init__(self, model: str, config: EngineConfig, *, on_cuda: bool) -> None:
        """Starts them, and shares this process's threads with them. Raises SetupError where there are fewer GPUs than
        ranks."""
        self._size, self._threads_alone = config.tensor_parallel_size, torch.get_num_threads()
        num_threads = max(1, self._threads_alone // self._size)
        gpus = _gpus(self._size) if on_cuda else []
        self._children: list[subprocess.Popen[bytes]] = []
        torch.set_num_threads(num_threads)
        for rank in range(1, self._size):
            environment = SHARED_CORES_ENVIRONMENT | MEMORY_ENVIRONMENT | os.environ
            if gpus:
                environment[VISIBLE] = gpus[rank]
            child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment | {"OMP_NUM_THREADS": str(num_threads)},
            )
            self._children.append(child)
            self._send(child, pickle.dumps(Order(model=model, config=config, rank=rank, num_threads=num_threads)))

    def join(self, device: torch.device) -> Group:
        """As `OtherRanks.join`."""
        for rank, child in enumerate(self._children, 1):
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise SetupError(f"rank {rank} of {self._size} ended with status {child.wait()} while it loaded")
            _raise_reported(json.loads(line))
        with tempfile.TemporaryDirectory(prefix="moe-cluster-ranks-") as folder:  # for this user alone
            meeting = Path(folder) / "meeting"
            for child in self._children:
                self._send(child, pickle.dumps(str(meeting)))
            return Group(meeting, 0, self._size, device)

    def close(self) -> None:
        """Safe to call again."""
        if self._children:
            torch.set_num_threads(self._threads_alone)
        for child in self._children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        self._children = []

    def _send(self, child: subprocess.Popen[bytes], message: bytes) -> None:
        assert child.stdin is not None
        try:
            child.stdin.write(message)
            child.stdin.flush()
        except BrokenPipeError:
            log.debug("a rank's process is gone")  # which `join` tells


def _gpus(size: int) -> list[str]:
    """The devices of each rank, as the environment names them. Rank 0 computes on the first. Raises SetupError."""
    count = torch.cuda.device_count()
    if count < size:
        raise SetupError(f"{FIELD} is {size}, and this process sees {count} GPUs: each rank needs one of its own")
    visible = os.environ.get(VISIBLE, "")
    return [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]


def _raise_reported(report: dict[str, str]) -> None:
    kinds: dict[str, type[ClusterError]] = {kind.__name__: kind for kind in (CheckpointError, SetupError)}
    if report:
        raise kinds.get(report["kind"], SetupError)(report["message"])


def main() -> None:
    """A child's life. Ctrl-C is for its parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # what anything else prints belongs to the caller's messages
        heard: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(sys.stdin.buffer, heard), daemon=True).start()
        order = heard.get()
        assert isinstance(order, Order)
        torch.set_num_threads(order.num_threads)
        try:
            loaded, report = LoadedRank(order.model, order.config, order.rank), {}
        except ClusterError as error:
            loaded, report = None, {"kind": type(error).__name__, "message": str(error)}
        answer.write(json.dumps(report).encode() + b"\n")
    if loaded is None:
        return
    meeting = Path(str(heard.get()))
    size = order.config.tensor_parallel_size
    try:
        loaded.follow(lambda device: Group(meeting, order.rank, size, device), 1)
    except Unavailable as error:
        log.info("rank %d ends: %s", order.rank, error)


def _listen(pipe: BinaryIO, heard: "queue.SimpleQueue[object]") -> None:
    """Ends the process with the pipe, whatever it does meanwhile."""
    while True:
        try:
            heard.put(pickle.load(pipe))
        except EOFError:
            os._exit(0)
