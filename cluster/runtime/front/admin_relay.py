"""Stands at the path where Serve looks for HAProxy's admin socket, and changes the pid in HAProxy's answers.

Serve regards its HAProxy as started when the admin socket names the pid that Serve started.
"""

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 3.0  # for an HAProxy that is being started again
RETRY_S = 0.02


class AdminRelay:
    """haproxy: HAProxy's own socket.  renamed: makes of HAProxy's answer the one that a client gets."""

    def __init__(self, haproxy: Path, renamed: Callable[[bytes], bytes]) -> None:
        self._haproxy = haproxy
        self._renamed = renamed

    async def answer(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Serves one connection: passes commands on as they come, and the whole answer when HAProxy has closed."""
        with suppress(OSError):  # the client sees its connection end
            haproxy, to_haproxy = await self._connect()
            commands = asyncio.create_task(_pass_on(client, to_haproxy))
            try:
                to_client.write(self._renamed(await haproxy.read()))
                await to_client.drain()
            finally:
                commands.cancel()
                to_haproxy.close()
        to_client.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await asyncio.open_unix_connection(str(self._haproxy))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)


def with_pid(pid: int, answer: bytes) -> bytes:
    """HAProxy's answer to `show info`, with this pid in place of its own."""
    return re.sub(rb"^Pid: \d+$", b"Pid: %d" % pid, answer, flags=re.MULTILINE)


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        sink.write_eof()
