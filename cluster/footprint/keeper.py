"""The process that outlives its killed owner: at the owner's end it removes the folder and its processes.

It is in a session of its own and ignores signals that ask it to end: a terminal, `timeout` or systemd sends these to
all of a server's processes.
"""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from cluster.footprint.folders import OwnedFolder, clean, remove

LOOK_INTERVAL_S = 0.5  # where the kernel has no handles for processes


def start_keeper(folder: OwnedFolder) -> "subprocess.Popen[bytes]":
    """Starts the keeper of a folder of this process. Kill it when the folder is removed."""
    # A bare interpreter: modules that a user's site-packages import at each start would only take memory.
    return subprocess.Popen(
        [sys.executable, "-S", "-m", __name__, str(os.getpid()), str(folder.path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(folder.lock,),  # the folder stays locked while the keeper cleans up
        start_new_session=True,
    )


def main(owner: int, folder: Path) -> None:
    """owner: the pid of the process that has started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_end(owner)
    remove(folder)
    clean()


def _wait_for_end(parent: int) -> None:
    try:
        handle = os.pidfd_open(parent)
    except OSError:
        while os.getppid() == parent:
            signal.sigtimedwait([], LOOK_INTERVAL_S)
        return
    if os.getppid() == parent:  # else it has ended already, and the pid may be another's
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
