"""The other end of `worker`: starts its process when it is first needed, and again when it is gone."""

import logging
import os
import pickle
import select
import subprocess
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.errors import ClusterError, InvalidRequest, Unavailable
from cluster.logs import SeldomLog
from cluster.serving.text.worker import LENGTH, RENDER, TOKENIZE, Task, write_frame

log = logging.getLogger(__name__)
seldom = SeldomLog(log)

MAX_START_S = 60.0  # of a process, on a busy machine
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The purpose of a process. mode: of `worker`.  does, field: for the message to one whose input took too long.
    max_task_s: of the clock, for one input.  max_cpu_s: of the processor, for one that is rendered; on a busy machine
    the clock says little about a template."""

    mode: str
    does: str
    field: str
    max_task_s: float = 60.0  # a megabyte takes some seconds to tokenize
    max_cpu_s: float = 5.0


TOKENIZING = Job(mode=TOKENIZE, does="tokenize", field="input")
RENDERING = Job(mode=RENDER, does="render with the model's chat template", field="chat")


class TextProcess:
    """One process for a checkpoint. For one thread."""

    def __init__(self, model_dir: Path, job: Job = TOKENIZING) -> None:
        self._model_dir, self._job = model_dir, job
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process where none runs. One that cannot start is the next task's to report. Blocks."""
        try:
            self._started()
        except EOFError:
            self._give_up()
        except Unavailable as error:
            log.warning("%s", error)

    def do(self, task: Task) -> "array[int] | str":
        """Raises InvalidRequest, Unavailable. Blocks."""
        try:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            write_frame(process.stdin, task)
            outcome = _read_frame(process.stdout, time.monotonic() + self._job.max_task_s)
        except (EOFError, BrokenPipeError) as error:
            self._give_up()
            raise Unavailable("the process for this input ended while it had it: send it again") from error
        except TimeoutError as error:
            self._give_up()
            job = self._job
            raise InvalidRequest(
                f"the {job.field} takes longer than {job.max_task_s:g} s to {job.does}: send a shorter one", job.field
            ) from error
        if isinstance(outcome, ClusterError):
            raise outcome
        assert isinstance(outcome, array | str)
        return outcome

    def end(self) -> None:
        """Ends the process; the next task starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _give_up(self) -> None:
        process = self._process
        self.end()
        seldom.warning("the process to %s is gone, with code %s", self._job.does, process and process.returncode)

    def _started(self) -> "subprocess.Popen[bytes]":
        """The process, ready for a task. Raises EOFError, Unavailable."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster.serving.text.worker"),
                *(str(self._model_dir), self._job.mode, str(self._job.max_cpu_s)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdout is not None
        try:
            _read_frame(self._process.stdout, time.monotonic() + MAX_START_S)
        except TimeoutError as error:
            self._give_up()
            raise Unavailable(f"the process to {self._job.does} did not start in {MAX_START_S:g} s") from error
        return self._process


def _read_frame(stream: IO[bytes], deadline_s: float) -> object:
    """Raises EOFError, TimeoutError."""
    (length,) = LENGTH.unpack(_read(stream, LENGTH.size, deadline_s))
    return pickle.loads(_read(stream, length, deadline_s))


def _read(stream: IO[bytes], size: int, deadline_s: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not select.select([stream], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(stream.fileno(), min(READ_BYTES, size - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
