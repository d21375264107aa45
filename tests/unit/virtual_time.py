"""An event loop whose clock runs only while nothing else can: a minute takes no time, and what happens when is sure."""

import asyncio
import selectors


class _Selector(selectors.SelectSelector):
    """Lets the time that the loop would wait for pass at once."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "all wait, and nothing will ever happen"
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self):
        return self._clock.now

    def run_in_executor(self, executor, func, *args):
        """At once: a thread's work would take no virtual time."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # its waiter gets it
            done.set_exception(error)
        return done


def run(play):
    """Runs `play`, a coroutine function, and ends what it has left; returns its result."""
    failures = []
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        # Not logged: a log line with a traceback, from a task that is collected while pytest parses, ends pytest.
        runner.get_loop().set_exception_handler(lambda loop, context: failures.append(context))
        result = runner.run(play())
    assert failures == []
    return result


def now():
    """The time of the running loop: a clock for what is tested."""
    return asyncio.get_running_loop().time()
