"""Runs an HAProxy on listening sockets that outlive it. Does not know what HAProxy's configuration means.

Serve (2.60) starts `keeper.py` as HAProxy for each configuration, with the pid of the one before it. The keeper keeps
this process running, and this process keeps HAProxy running.

    ends                what happens
    HAProxy             this process starts another one; connections wait at the sockets meanwhile
    this process        HAProxy ends with it, and the keeper starts both again, on the same sockets
    the keeper          HAProxy serves on. Serve gets no answer at the admin socket, and makes another manager
    Serve's manager     HAProxy serves on, until the next manager's HAProxy takes the sockets over
    Ray's raylet, the manager's parent
                        all of them end, and the sockets close
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.process_identity import identity, is_alive, parent_of
from cluster.runtime.front.admin_relay import AdminRelay, with_pid
from cluster.runtime.front.listeners import Handed, ask_for, hand_over, serve_at
from cluster.runtime.front.renewal import Copy, ask, end_with_parent, watch

START_TIMEOUT_S = 25.0  # Serve waits 30 s
READY_INTERVAL_S = 0.02
LOOK_S = 0.2  # between two checks that keeper, manager and raylet live
ORPHAN_S = 120.0  # without a manager; Serve starts another within 4 s, on a busy machine much later
STAND_IN_S = 60.0  # in which the next manager learns the applications
MAX_DEATHS, DEATHS_S = 10, 30.0  # of HAProxy in a row: another start will not help
AGAIN = 75  # this process's exit code when its keeper must find a new place


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontFiles:
    """Paths in one folder. admin: the socket that Serve asks.  handover: where a successor asks for the sockets.
    inner: HAProxy's own admin socket.  config: the file for HAProxy. The last two belong to this process alone."""

    admin: Path
    handover: Path
    inner: Path
    config: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontTask:
    """The task of one front.

    command: HAProxy's, without its configuration.  old_pids: the processes that shall drain.  addresses: to listen on.
    text: makes the configuration, from the sockets' descriptors, and whether HAProxy keeps the servers' old states.
    serves: whether the configuration has an application.
    """

    command: Sequence[str]
    old_pids: Sequence[int]
    addresses: Sequence[str]
    text: Callable[[Mapping[str, int], bool], str]
    serves: bool
    copies: Sequence[Copy]
    read: Mapping[Path, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a front listens.

    predecessor: the front that has listened there until now.
    stands_in: the predecessor serves on, and `listeners` are sockets that nobody knows, because a manager that follows
        a dead one does not know any application yet.
    """

    listeners: Mapping[str, socket.socket]
    predecessor: Handed | None
    stands_in: bool

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()


class Front:
    """Keeps one configuration's HAProxy. manager: Serve's, the keeper's parent. Its own parent is the raylet."""

    def __init__(self, task: FrontTask, files: FrontFiles, place: Place, *, keeper: int, manager: int) -> None:
        self._task = task
        self._files = files
        self._place = place
        self._keeper = keeper
        self._manager = identity(manager)
        self._raylet = identity(parent_of(manager))
        self._started_at = self._wanted_at = time.monotonic()
        self._handover: socket.socket | None = None
        self._admin: asyncio.AbstractServer | None = None
        self._haproxy: asyncio.subprocess.Process | None = None
        self._draining = self._ending = self._again = False
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    async def run(self) -> int:
        """Returns the exit code: HAProxy's, or AGAIN."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._drain)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a terminal that closes must not end it
        await self._start(states=True)
        try:
            if not await self._is_ready():
                return await self._exit_code()
            await self._publish()
            looking = asyncio.create_task(self._look())
            code = await self._keep()
            looking.cancel()
            return AGAIN if self._again else code
        finally:
            for path in (self._files.inner, self._files.config):
                path.unlink(missing_ok=True)

    async def _start(self, *, states: bool) -> None:
        fds = {address: listener.fileno() for address, listener in self._place.listeners.items()}
        self._files.config.write_text(self._task.text(fds, states))
        self._haproxy = await asyncio.create_subprocess_exec(
            *self._task.command,
            "-f",
            str(self._files.config),
            pass_fds=tuple(fds.values()),
            preexec_fn=partial(end_with_parent, os.getpid()),
        )

    async def _is_ready(self) -> bool:
        """Waits until HAProxy answers; ends it if it does not."""
        assert self._haproxy is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._haproxy.returncode is None and time.monotonic() < deadline:
            with suppress(OSError):
                if f"\nPid: {self._haproxy.pid}\n" in await asyncio.to_thread(ask, "show info\n", self._files.inner):
                    return True
            await asyncio.sleep(READY_INTERVAL_S)
        self._end()
        return False

    async def _publish(self) -> None:
        """Opens the admin socket, and makes the predecessors drain."""
        relay = AdminRelay(self._files.inner, partial(with_pid, self._keeper))
        self._admin = await asyncio.start_unix_server(relay.answer, sock=serve_at(self._files.admin))
        pids = set(self._task.old_pids)
        if not self._place.stands_in:
            self._offer()
            if self._place.predecessor is not None:
                pids |= {self._place.predecessor.pid, self._place.predecessor.keeper}
        _signal(pids, signal.SIGUSR1)
        threading.Thread(target=self._renew, name="renewal", daemon=True).start()

    def _offer(self) -> None:
        self._handover = serve_at(self._files.handover)
        asyncio.get_running_loop().add_reader(self._handover, self._hand_over)

    def _hand_over(self) -> None:
        assert self._handover is not None
        self._wanted_at = time.monotonic()
        hand_over(self._handover, self._place.listeners, self._keeper)

    def _renew(self) -> None:
        def haproxy() -> int:
            return 0 if self._draining or self._haproxy is None else self._haproxy.pid

        watch(self._task.copies, self._task.read, self._files.inner, haproxy)

    async def _keep(self) -> int:
        """Starts HAProxy again whenever it ends, unless it was asked to end."""
        while True:
            code = await self._exit_code()
            if self._draining or self._ending:
                return code
            now = time.monotonic()
            if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_S:
                _say(f"HAProxy ended {MAX_DEATHS} times within {DEATHS_S:g} s: given up")
                return 1
            self._deaths.append(now)
            _say(f"HAProxy ended with {code}, its streams with it: another one starts")
            # The file of servers' states is as old as the first start: without it all count as up, and are checked.
            await self._start(states=False)

    async def _exit_code(self) -> int:
        assert self._haproxy is not None
        code = await self._haproxy.wait()
        return code if code >= 0 else 128 - code

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            kept = os.getppid() == self._keeper
            if kept and is_alive(self._manager):
                self._wanted_at = now
            if not kept and self._admin is not None:
                self._admin.close()  # Serve reloads through a living keeper only; without an answer it makes a manager
            if not is_alive(self._raylet):
                self._end()
            elif not self._draining and now - self._wanted_at > ORPHAN_S:
                _say(f"no process took HAProxy over in {ORPHAN_S:g} s after Serve's manager ended: HAProxy ends too")
                self._end()
            elif self._place.stands_in and not self._again:
                self._look_at_predecessor(now)

    def _look_at_predecessor(self, now: float) -> None:
        """Ends with AGAIN, for the predecessor's place, when that is gone or this front has stood in for STAND_IN_S."""
        handed = ask_for(self._files.handover)
        if handed is not None:
            handed.close()
        before = self._place.predecessor
        lives = handed is not None or (before is not None and is_alive(identity(before.keeper)))
        if not lives or now - self._started_at > STAND_IN_S:
            self._again = True
            self._end()

    def _drain(self) -> None:
        """Gives the sockets up, as a successor has them; HAProxy ends when its streams have ended."""
        self._draining = True
        if self._handover is not None:
            asyncio.get_running_loop().remove_reader(self._handover)
            self._handover.close()
            self._handover = None
        self._place.close()  # nobody would accept a connection here
        self._kill(signal.SIGUSR1)

    def _end(self) -> None:
        self._ending = True
        self._kill(signal.SIGTERM)

    def _kill(self, number: signal.Signals) -> None:
        if self._haproxy is not None and self._haproxy.returncode is None:
            with suppress(ProcessLookupError):
                self._haproxy.send_signal(number)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _say(what: str) -> None:
    sys.stderr.write(f"moe-cluster: {what}\n")
    sys.stderr.flush()
