"""A `moe-cluster serve` for one test, which kills parts of it, and looks for its traces."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc

from cluster.footprint.processes import members
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

COMMAND = [str(Path(sys.executable).parent / "moe-cluster")]
TINY = ["--device", "cpu", "--dtype", "float32", "--expert-shards", "1", "--kv-cache-bytes", str(8 << 20)]
PORTS = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
ONE_ATTEMPT = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}  # for starts that fail: Serve makes three otherwise


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


class Serving:
    """Its process is the leader of a group, as a shell's job is."""

    def __init__(self, model, tmp_path, *options, environment=None, ports=PORTS):
        self.out, self.err = tmp_path / "out", tmp_path / "err"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", str(model), *TINY, *ports, *options], stdout=out, stderr=err,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self, timeout_s=180.0):
        def ready():
            assert self.process.poll() is None, self.err.read_text()
            return "Ctrl-C drains" in self.out.read_text()

        wait_until(ready, timeout_s)
        [self.grpc_port] = re.findall(r"gRPC     127.0.0.1:(\d+)", self.out.read_text())
        [self.metrics] = re.findall(r"metrics  (http\S+)", self.out.read_text())
        [self.folder] = [Path(words[-1]) for words in keepers() if words[-2] == str(self.process.pid)]
        return self

    def pid_of(self, program):
        [pid] = [pid for pid in members(self.folder) if command(pid)[0].endswith(f"/{program}")]
        return pid

    def kill(self, program):
        os.kill(self.pid_of(program), signal.SIGKILL)

    def stream(self, max_tokens):
        return Stream(f"127.0.0.1:{self.grpc_port}", max_tokens)

    def end(self):
        """Kills the process that a failed test has left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Stream:
    """A request in a thread; `begun` is set with its first token. code: None for a good end."""

    def __init__(self, address, max_tokens):
        self.begun, self.code, self.num_tokens = threading.Event(), None, 0
        params = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._address, self._request = address, pb.GenerateStreamRequest(text="hello", sampling_params=params)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self.begun.wait(30)

    def _run(self):
        with grpc.insecure_channel(self._address) as channel:
            try:
                for piece in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
                    self._request, timeout=120
                ):
                    self.num_tokens += len(piece.token_ids)
                    self.begun.set()
            except grpc.RpcError as error:
                self.code = error.code()
                self.ended_at = time.monotonic()

    def join(self, timeout_s=60.0):
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self.code


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] or [""]
    except OSError:
        return [""]


def keepers():
    """The command lines of running keepers."""
    every = (command(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return [words for words in every if "cluster.footprint.keeper" in words]
