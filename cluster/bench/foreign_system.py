"""vLLM and llama.cpp as a `System`, each in an environment of its own that the user names: packages would clash."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.bench.sampling import GREEDY, Sampling
from cluster.bench.spec import SystemSpec
from cluster.bench.throughput import Prompts, Workload
from cluster.config.quantization import PLAIN
from cluster.config.resources import available_cpus
from cluster.errors import ClusterError

_WORKERS = {"vllm": "vllm_worker.py", "llama.cpp": "llama_worker.py"}


class ForeignSystem:
    """Tuned by the caller's variables (SystemSpec.variables), which its process alone gets."""

    def __init__(self, spec: SystemSpec, workload: Workload) -> None:
        """Raises ClusterError if it does not start; stderr has its output."""
        options = {
            "model": str(spec.model_dir),
            "dtype": spec.dtype,
            "max_model_len": workload.prompt_tokens + workload.output_tokens,
            "max_num_seqs": workload.batches[-1],
            "num_threads": available_cpus(),
        }
        if spec.kind == "llama.cpp":
            options["weights"] = "bf16" if spec.quantization == PLAIN else spec.quantization
        worker = Path(__file__).with_name(_WORKERS[spec.kind])
        self._process = subprocess.Popen(
            [spec.python, str(worker), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(spec.python).parent,  # not this package's folder: its modules are not for that environment
            env={**os.environ, **dict(spec.variables)},
            start_new_session=True,
        )
        names = " ".join(f"{name}={_without_folders(value)}" for name, value in spec.variables)
        self.detail = f"{self._answer()['ready']} {names}".strip()

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        assert self._process.stdin is not None
        task = {"prompts": prompts, "num_tokens": num_tokens, "sampling": sampling.settings()}
        print(json.dumps(task), file=self._process.stdin, flush=True)
        counts: list[int] = self._answer()["counts"]
        return counts

    def close(self) -> None:
        with suppress(ProcessLookupError):  # vLLM's own workers outlive its first process
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ClusterError(f"its worker ended with code {self._process.wait()}; see its output above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _without_folders(value: str) -> str:
    """A report names no path of the machine. value: of a variable, perhaps several paths with colons between."""
    return ":".join(Path(part).name if part.startswith("/") else part for part in value.split(":"))
