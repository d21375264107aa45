"""Memory goes back to the system after a large step, when no step has followed for a while."""

import os
import subprocess
import sys

from cluster.config.environment import MEMORY_ENVIRONMENT
from cluster.idle_memory import LARGE_ROWS, REST_S, IdleMemory

FREES_100_MB = """
import time
import torch
from cluster.config.environment import MEMORY_ENVIRONMENT
from cluster.idle_memory import LARGE_ROWS, IdleMemory, give_back

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

blocks = [torch.ones(50_000) for _ in range(500)]
behind = torch.ones(1000)  # keeps the heap's end
del blocks
before = own_bytes()
IdleMemory(give_back, rest_s=0.1).worked(LARGE_ROWS)
for _ in range(600):
    if own_bytes() < before - 80_000_000:
        print("given back")
        break
    time.sleep(0.1)
"""


def test_memory_is_given_back_when_the_process_rests():
    times = iter([0.0, 0.0, 0.4, REST_S])  # of the step, and of three looks
    slept, released = [], []
    memory = IdleMemory(lambda: released.append(True), lambda: next(times), slept.append)
    memory._thread = object()  # the test waits itself
    memory.worked(LARGE_ROWS)
    memory.release_when_idle()
    assert slept == [REST_S, REST_S - 0.4]
    assert released == [True]


def test_a_step_in_between_puts_it_off():
    now, released = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        if now[0] < 3 * REST_S:
            memory.worked(1)

    memory = IdleMemory(lambda: released.append(now[0]), lambda: now[0], sleep)
    memory._thread = object()
    memory.worked(LARGE_ROWS)
    memory.release_when_idle()
    assert released == [3 * REST_S]


def test_small_steps_start_no_thread():
    memory = IdleMemory(lambda: None)
    memory.worked(LARGE_ROWS - 1)
    assert memory._thread is None


def test_a_process_gives_back_what_it_has_freed():
    done = subprocess.run(
        [sys.executable, "-c", FREES_100_MB],
        env={**os.environ, **MEMORY_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "given back\n"
