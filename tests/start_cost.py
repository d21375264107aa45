"""Prints what a start of `moe-cluster serve` costs: seconds to ready, CPU time and memory of all its processes; and the
seconds of its end by Ctrl-C.

python tests/start_cost.py [TREE …]: source trees with built kernels, which take turns; by default this one. Linux.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROUNDS = 3
REST_S = 3.0  # until the last processes are there
MARK = "MOE_CLUSTER_TEST_START"  # in the environment of a start's processes
OPTIONS = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--kv-cache-bytes", "50000000"]
TICKS = os.sysconf("SC_CLK_TCK")


def of_process(folder: Path) -> tuple[float, int]:
    """CPU seconds, and bytes of its own memory (RssAnon)."""
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    lines = (folder / "status").read_text().splitlines()
    own_bytes = next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
    return sum(map(int, fields[11:15])) / TICKS, own_bytes


def measure(tree: str, mark: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": tree, MARK: mark}
    command = [sys.executable, "-m", "cluster.cli", "serve", "demo", *OPTIONS]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "out", "w+") as out:
        started = time.monotonic()
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        while "Ctrl-C drains" not in (printed := Path(out.name).read_text()):
            assert server.poll() is None, printed
            time.sleep(0.05)
        seconds = time.monotonic() - started
        time.sleep(REST_S)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(of_process(process))
        asked = time.monotonic()
        os.killpg(server.pid, signal.SIGINT)
        server.wait()
        end_s = time.monotonic() - asked
    cpu, own_bytes = (sum(each) for each in zip(*found, strict=True))
    return (
        f"{seconds:.1f} s, {cpu:.1f} s of CPU, {own_bytes / 1e6:.0f} MB in {len(found)} processes, {end_s:.1f} s to end"
    )


def main(trees: list[str]) -> None:
    for turn in range(ROUNDS):
        for number, tree in enumerate(trees):
            print(f"{tree}: {measure(tree, f'{os.getpid()}-{turn}-{number}')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [str(Path(__file__).parents[1])])
