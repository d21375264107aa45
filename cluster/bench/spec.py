"""Names the system to measure. Knows no system: `systems` builds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.bench.throughput import Workload
from cluster.config import ModelConfig
from cluster.config.environment import MEMORY_ENVIRONMENT, SHARED_CORES_ENVIRONMENT
from cluster.config.quantization import PLAIN

FOREIGN = {"vllm": "vllm", "llama.cpp": "llama_cpp"}  # systems in environments of their own, and what they import
LLAMA_FORMS = ("q8_0", "q4_0")  # of llama.cpp's files, beside bfloat16
_BLOCK_TOKENS = 64  # room for any block size of the KV cache up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSpec:
    """The system to build.

    dtype: never "auto".  num_shards: expert shards, for carriers; `local` has one.
    gpus_per_shard: None is one on a machine with GPUs.  cuda_graphs: None is the configuration's default.
    quantization: of this package's weights, PLAIN, of QUANTIZATIONS, or a form in which model_dir has them; PLAIN or of
    LLAMA_FORMS of llama.cpp's.
    speculative_config: of this package's engine, None for one token a step.
    num_adapters: LoRA adapters, made for it, that the prompts have in turns; 0 for the base alone.
    python, variables: the interpreter that has vLLM or llama.cpp, and variables for its process.
    """

    kind: Literal["local", "stream", "ray", "transformers", "vllm", "llama.cpp"]
    model_dir: Path
    dtype: str
    num_shards: int
    gpus_per_shard: float | None = None
    cuda_graphs: bool | None = None
    quantization: str = PLAIN
    speculative_config: Mapping[str, Any] | None = None
    num_adapters: int = 0
    python: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def split(self) -> bool:
        """Whether its experts are in processes of their own."""
        return self.kind in ("stream", "ray")

    @property
    def name(self) -> str:
        where = f"{self.kind}, {self.num_shards} shards" if self.split else self.kind
        graphs = {None: "", True: ", CUDA graphs", False: ", no graphs"}[self.cuda_graphs]
        weights = "" if self.quantization == PLAIN else f", {self.quantization}"
        adapters = f", {self.num_adapters} adapter{'s' * (self.num_adapters > 1)}" if self.num_adapters else ""
        return where + graphs + weights + _drafts(self.speculative_config) + adapters

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start its process with. All keep freed memory in the process; beside shards, threads do not spin
        while they wait, as in a served engine."""
        if self.kind in FOREIGN:
            return {}  # they have allocators of their own
        threads = SHARED_CORES_ENVIRONMENT if self.split else {}
        return {**MEMORY_ENVIRONMENT, **threads}


def _drafts(config: Mapping[str, Any] | None) -> str:
    """A system's name tells apart what `--speculative-config` may give several times."""
    if config is None:
        return ""
    model = f" {Path(config['model']).name}" if config.get("model") else ""
    others = {key: value for key, value in config.items() if key not in ("method", "model")}
    return f", {config['method']}{model}" + "".join(f", {key} {value}" for key, value in others.items())


def kv_cache_bytes(config: ModelConfig, dtype: str, workload: Workload) -> int:
    """Bytes that the largest batch takes: each sequence rounded up to _BLOCK_TOKENS, and one block more."""
    num_tokens = workload.prompt_tokens + workload.output_tokens
    num_blocks = -(-num_tokens // _BLOCK_TOKENS) + 1
    return workload.batches[-1] * num_blocks * _BLOCK_TOKENS * config.kv_bytes_per_token(dtype)


def step_tokens(workload: Workload) -> int:
    """The token budget of a step: all prompts at once, as transformers takes them, within 2048 to 8192."""
    return min(max(workload.batches[-1] * workload.prompt_tokens, 2048), 8192)
