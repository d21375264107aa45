"""Starts Ray's processes apart from this one's signals, and watches them.

A terminal, `timeout` and a shell send signals to a whole group of processes. Ray's (2.60) would end at once, while this
process drains: so they start in sessions of their own.
"""

import ctypes
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.runtime.ray_private.core import services, started_processes, utils

NAMES = {"gcs_server": "Ray's GCS", "raylet": "Ray's raylet"}  # without one of them there is no cluster
PR_SET_PDEATHSIG = 1


@contextmanager
def apart() -> Iterator[None]:
    """Gives the processes that Ray starts meanwhile sessions of their own, and keeps a handler for SIGTERM. Ray has no
    setting for either."""
    before, set_handler = services.ConsolePopen, utils.set_sigterm_handler
    prctl, in_main_thread = ctypes.CDLL(None).prctl, threading.current_thread() is threading.main_thread()

    class Apart(before):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, preexec_fn: Callable[[], None], **kwargs: Any) -> None:
            def prepare() -> None:
                preexec_fn()
                if not in_main_thread:  # Ray's processes would end with this thread; the keeper stays
                    prctl(PR_SET_PDEATHSIG, 0)

            super().__init__(*args, preexec_fn=prepare, start_new_session=True, **kwargs)

    services.ConsolePopen = Apart
    ours = signal.getsignal(signal.SIGTERM)
    if ours is not signal.SIG_DFL:  # Ray would replace our handler
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = before, set_handler
        if ours not in (signal.SIG_DFL, None) and in_main_thread:  # Ray's C++ part replaces it too, unseen by Python
            signal.signal(signal.SIGTERM, ours)


class RayWatch:
    """Reports once when Ray's GCS or raylet has ended. Stop it before you end them on purpose."""

    def __init__(self, on_end: Callable[[str], None]) -> None:
        """on_end: a thread calls it with the process that ended, and how."""
        started = started_processes()
        self._processes = {NAMES[kind]: started[kind][0].process for kind in NAMES}
        self._on_end = on_end
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="ray-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """May be called by on_end too. Safe to call again."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        poll, names = select.poll(), {}
        poll.register(self._reader, select.POLLIN)
        for name, process in self._processes.items():
            handle = os.pidfd_open(process.pid)
            names[handle] = name
            poll.register(handle, select.POLLIN)
        ended = [handle for handle, _ in poll.poll()]
        for handle in (self._reader, *names):
            os.close(handle)
        if self._reader not in ended:
            self._on_end(", ".join(f"{names[handle]} {self._fate(names[handle])}" for handle in ended))

    def _fate(self, name: str) -> str:
        process: subprocess.Popen[bytes] = self._processes[name]
        code = process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"(pid {process.pid}) {how}"
