"""Says whether this server takes requests: one flag, which fronts read and watch. Knows no protocol."""

import asyncio
import threading
from collections.abc import AsyncGenerator


class HealthState:
    """Says whether this server takes requests. `set` may be called from any thread; it starts as not serving."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serving = False
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @property
    def serving(self) -> bool:
        return self._serving

    def set(self, serving: bool) -> None:
        with self._lock:
            self._serving = serving
            for changed, loop in self._watchers.items():
                loop.call_soon_threadsafe(changed.set)

    async def watch(self) -> AsyncGenerator[bool, None]:
        """Yields the state now and after each change; of quick ones only the last. Never ends by itself."""
        changed = asyncio.Event()
        with self._lock:
            self._watchers[changed] = asyncio.get_running_loop()
        try:
            last: bool | None = None
            while True:
                changed.clear()
                serving = self._serving
                if serving != last:
                    last = serving
                    yield serving
                await changed.wait()
        finally:
            with self._lock:
                del self._watchers[changed]
