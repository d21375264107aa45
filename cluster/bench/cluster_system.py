"""This package's engine as a `System`, in one process or with its experts on Ray actors."""

import itertools
import tempfile
from pathlib import Path

import torch

from cluster.bench.checkpoint import read_config
from cluster.bench.sampling import GREEDY, Sampling
from cluster.bench.spec import SystemSpec, kv_cache_bytes, step_tokens
from cluster.bench.throughput import Prompts, Workload
from cluster.checkpoint.made.adapter import write_adapter
from cluster.checkpoint.opening import open_checkpoint
from cluster.checkpoint.sizes import sizes_of
from cluster.config import DEFAULTS, ModelConfig, Transport
from cluster.config.quantization import PLAIN, QUANTIZATIONS
from cluster.llm import LLM

ADAPTER_RANK = 16  # of most published adapters; PEFT's own default is 8


class ClusterSystem:
    """num_threads: None leaves the threads to the launcher of the Ray actors."""

    def __init__(self, spec: SystemSpec, config: ModelConfig, workload: Workload, num_threads: int | None) -> None:
        assert spec.kind in ("local", "stream", "ray")
        transport: Transport = spec.kind
        where = "experts on Ray actors"
        if num_threads is not None:
            torch.set_num_threads(num_threads)
            where = f"{'cuda' if torch.cuda.is_available() else 'cpu'}, {num_threads} threads"
        weights = f"weights of {_weight_bytes(spec) / 1e9:.2f} GB"
        self.detail = f"{where}, {weights}, up to {step_tokens(workload)} tokens a step"
        self._llm = LLM(
            spec.model_dir,
            dtype=spec.dtype,
            quantization=_rounding(spec),
            speculative_config=spec.speculative_config,
            num_expert_shards=spec.num_shards if spec.split else 1,
            transport=transport,
            kv_cache_bytes=sum(kv_cache_bytes(one, spec.dtype, workload) for one in (config, *_drafting(spec))),
            max_num_batched_tokens=step_tokens(workload),
            max_num_seqs=workload.batches[-1],
            skip_tokenizer=True,
            gpus_per_expert_shard=spec.gpus_per_shard,
            cuda_graphs=DEFAULTS["cuda_graphs"] if spec.cuda_graphs is None else spec.cuda_graphs,
        )
        self._load_adapters(spec, config)

    def _load_adapters(self, spec: SystemSpec, config: ModelConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(spec.num_adapters):
                directory = Path(folder) / str(number)
                write_adapter(directory, config, rank=ADAPTER_RANK, seed=number)
                self._llm.load_adapter(f"adapter-{number}", directory)
        if spec.num_adapters:
            self.detail += f", adapters of rank {ADAPTER_RANK}"

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        params = sampling.params(len(prompts), num_tokens)
        names = list(itertools.islice(itertools.cycle(self._llm.adapters or ("",)), len(prompts)))
        return [len(output.token_ids) for output in self._llm.generate(prompts, params, adapter=names)]

    def close(self) -> None:
        self._llm.close()


def _weight_bytes(spec: SystemSpec) -> int:
    """Of all processes together."""
    config = read_config(spec.model_dir)
    sizes = sizes_of(config, spec.dtype, quantization=spec.quantization, expert_quantization=spec.quantization)
    of_draft = sum(sizes_of(draft, spec.dtype, quantization=_rounding(spec)).dense_bytes for draft in _drafting(spec))
    return of_draft + sizes.dense_bytes + len(config.sparse_layers) * config.num_experts * sizes.expert_bytes


def _rounding(spec: SystemSpec) -> str:
    """The form to which weights are rounded while they are loaded."""
    return spec.quantization if spec.quantization in QUANTIZATIONS else PLAIN


def _drafting(spec: SystemSpec) -> list[ModelConfig]:
    """The model that drafts, if one does: its keys and values take their part of the cache."""
    model = (spec.speculative_config or {}).get("model")
    return [] if model is None else [open_checkpoint(model).config]
