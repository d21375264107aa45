"""Which system to measure. They themselves are in `cluster_system` and `transformers_system`."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.bench.throughput import System, Workload
from cluster.config import ModelConfig
from cluster.errors import SetupError

_BLOCK_TOKENS = 64  # room for any block size of the KV cache up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSpec:
    """What to build. dtype: never "auto".  num_shards: expert shards, for `ray`; `local` has one."""

    kind: Literal["local", "ray", "transformers"]
    model_dir: Path
    dtype: str
    num_shards: int

    @property
    def name(self) -> str:
        return f"ray, {self.num_shards} shards" if self.kind == "ray" else self.kind

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start its process with. Beside shards, threads that spin while they wait take the shards' cores:
        a served engine starts so too."""
        return {"OMP_WAIT_POLICY": "passive"} if self.kind == "ray" else {}


def build_system(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    """Loads the checkpoint; takes all cores of this process, except for `ray`, whose launcher deals them out.

    Imports late: a process that measures one system carries neither the memory nor the threads of the other.
    """
    num_threads = None if spec.kind == "ray" else len(os.sched_getaffinity(0))
    if spec.kind == "transformers":
        from cluster.bench.transformers_system import TransformersSystem

        return TransformersSystem(spec, num_threads)
    from cluster.bench.cluster_system import ClusterSystem

    return ClusterSystem(spec, config, workload, num_threads)


def require_transformers() -> None:
    """Raises SetupError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise SetupError("--compare transformers: it is not installed; pip install 'moe-cluster[test]' has it")


def kv_cache_bytes(config: ModelConfig, dtype: str, workload: Workload) -> int:
    """Bytes that the largest batch takes: each sequence rounded up to _BLOCK_TOKENS, and one block more."""
    num_tokens = workload.prompt_tokens + workload.output_tokens
    num_blocks = -(-num_tokens // _BLOCK_TOKENS) + 1
    return workload.batches[-1] * num_blocks * _BLOCK_TOKENS * config.kv_bytes_per_token(dtype)


def step_tokens(workload: Workload) -> int:
    """The token budget of a step: all prompts at once, as transformers takes them, within 2048 to 8192."""
    return min(max(workload.batches[-1] * workload.prompt_tokens, 2048), 8192)
