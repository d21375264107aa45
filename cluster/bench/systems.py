"""Which system to measure. They themselves are in `cluster_system`, `transformers_system` and `foreign_system`."""

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.bench.throughput import System, Workload
from cluster.config import ModelConfig
from cluster.config.environment import MALLOC_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.config.resources import available_cpus
from cluster.errors import SetupError

FOREIGN = {"vllm": "vllm", "llama.cpp": "llama_cpp"}  # systems in environments of their own, and what they import
_BLOCK_TOKENS = 64  # room for any block size of the KV cache up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSpec:
    """What to build. dtype: never "auto".  num_shards: expert shards, for carriers; `local` has one.
    gpus_per_shard: None is one where there are any.

    python, variables: the interpreter that has vLLM or llama.cpp, and what its process gets in its environment.
    """

    kind: Literal["local", "stream", "ray", "transformers", "vllm", "llama.cpp"]
    model_dir: Path
    dtype: str
    num_shards: int
    gpus_per_shard: float | None = None
    python: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def split(self) -> bool:
        """Whether its experts are in processes of their own."""
        return self.kind in ("stream", "ray")

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.num_shards} shards" if self.split else self.kind

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start its process with: memory that stays with the process for all, and beside shards threads
        that do not spin while they wait, as a served engine has them."""
        if self.kind in FOREIGN:
            return {}  # they have allocators of their own
        return {**MALLOC_ENVIRONMENT, **(SHARED_CORES_ENVIRONMENT if self.split else {})}


def build_system(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    """Loads the checkpoint; takes all cores of this process, except beside shards, whose launcher deals them out.

    Imports late: a process that measures one system carries neither the memory nor the threads of the other.
    """
    num_threads = None if spec.split else available_cpus()
    if spec.kind in FOREIGN:
        from cluster.bench.foreign_system import ForeignSystem

        return ForeignSystem(spec, workload)
    if spec.kind == "transformers":
        from cluster.bench.transformers_system import TransformersSystem

        return TransformersSystem(spec, num_threads)
    from cluster.bench.cluster_system import ClusterSystem

    return ClusterSystem(spec, config, workload, num_threads)


def check_shards(num_shards: int, config: ModelConfig) -> None:
    """Raises SetupError for a number that the checkpoint's experts do not allow."""
    if not 1 <= num_shards <= config.num_experts:
        raise SetupError(f"--shards is {num_shards}, 1 to {config.num_experts} (the experts) are possible")


def check_comparison(kind: str, python: str) -> None:
    """Raises SetupError where the other system cannot be run."""
    if kind == "transformers" and importlib.util.find_spec("transformers") is None:
        raise SetupError("--compare transformers: it is not installed; pip install 'moe-cluster[test]' has it")
    if kind in FOREIGN:
        option = f"--{kind.removesuffix('.cpp')}-python"
        if not python:
            raise SetupError(f"--compare {kind}: name the Python of an environment that has it with {option}")
        if subprocess.run([python, "-c", f"import {FOREIGN[kind]}"], capture_output=True).returncode:
            raise SetupError(f"{option} {python}: it cannot import {FOREIGN[kind]}")


def kv_cache_bytes(config: ModelConfig, dtype: str, workload: Workload) -> int:
    """Bytes that the largest batch takes: each sequence rounded up to _BLOCK_TOKENS, and one block more."""
    num_tokens = workload.prompt_tokens + workload.output_tokens
    num_blocks = -(-num_tokens // _BLOCK_TOKENS) + 1
    return workload.batches[-1] * num_blocks * _BLOCK_TOKENS * config.kv_bytes_per_token(dtype)


def step_tokens(workload: Workload) -> int:
    """The token budget of a step: all prompts at once, as transformers takes them, within 2048 to 8192."""
    return min(max(workload.batches[-1] * workload.prompt_tokens, 2048), 8192)
