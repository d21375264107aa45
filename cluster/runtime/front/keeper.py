"""Keeps a front running: starts its process again, on the same sockets, when something kills it.

Serve regards this process as HAProxy and sends it signals; it passes them on. It does nothing else, so that little
can end it.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from types import FrameType

from cluster.runtime.front.listeners import Handed, ask_for, open_listener
from cluster.runtime.front.supervisor import AGAIN, DEATHS_S, MAX_DEATHS, Front, FrontFiles, FrontTask, Place

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class FrontKeeper:
    def __init__(self, task: FrontTask, files: FrontFiles, manager: int) -> None:
        self._task = task
        self._files = files
        self._manager = manager
        self._place: Place | None = None
        self._child = 0
        self._leaving = False
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    def run(self) -> int:
        """Returns the exit code. Raises OSError when it cannot listen."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes must not end it
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        self._place = self._find_place(may_stand_in=True)
        while True:
            self._start()
            code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            self._child = 0
            if code == AGAIN and not self._leaving:
                self._place.close()
                self._place = self._find_place(may_stand_in=False)
            elif code >= 0 or self._leaving or not self._may_start_again(code):
                return code if code >= 0 else 128 - code

    def _find_place(self, *, may_stand_in: bool) -> Place:
        handed = ask_for(self._files.handover)
        if may_stand_in and handed is not None and not self._task.serves and not self._is_of_this_manager(handed):
            handed.close()
            hidden = {address: open_listener("127.0.0.1:0") for address in self._task.addresses}
            return Place(listeners=hidden, predecessor=handed, stands_in=True)
        old = dict(handed.listeners) if handed is not None else {}
        listeners: dict[str, socket.socket] = {}
        for address in self._task.addresses:
            listeners[address] = old.pop(address) if address in old else open_listener(address, self._task.old_pids)
        for listener in old.values():
            listener.close()
        return Place(listeners=listeners, predecessor=handed, stands_in=False)

    def _is_of_this_manager(self, handed: Handed) -> bool:
        return handed.keeper in self._task.old_pids

    def _start(self) -> None:
        """Forks, which is safe as no other thread runs here; a new program would take half a second to start."""
        assert self._place is not None
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the child's pid is known
        keeper, self._child = os.getpid(), os.fork()
        if self._child == 0:
            for number in PASSED_ON:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        if self._child == 0:
            front = Front(self._task, self._files, self._place, keeper=keeper, manager=self._manager)
            os._exit(asyncio.run(front.run()))

    def _may_start_again(self, code: int) -> bool:
        now = time.monotonic()
        given_up = len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_S
        self._deaths.append(now)
        then = "given up" if given_up else "another one starts"
        sys.stderr.write(f"moe-cluster: HAProxy's supervisor ended with {code}, HAProxy with it: {then}\n")
        sys.stderr.flush()
        return not given_up

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._leaving = True
        if number == signal.SIGUSR1 and self._place is not None:
            self._place.close()  # the successor has the sockets: nobody would accept a connection here
        if self._child:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(self._child, number)
