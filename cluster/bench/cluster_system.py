"""This package's engine as a `System`, in one process or with its experts on Ray actors."""

import torch

from cluster.bench.checkpoint import read_config
from cluster.bench.sampling import GREEDY, Sampling
from cluster.bench.spec import SystemSpec, kv_cache_bytes, step_tokens
from cluster.bench.throughput import Prompts, Workload
from cluster.checkpoint.opening import open_checkpoint
from cluster.checkpoint.sizes import sizes_of
from cluster.config import DEFAULTS, ModelConfig, Transport
from cluster.config.quantization import PLAIN, QUANTIZATIONS
from cluster.llm import LLM


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
            quantization=spec.quantization if spec.quantization in QUANTIZATIONS else PLAIN,
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

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        params = sampling.params(len(prompts), num_tokens)
        return [len(output.token_ids) for output in self._llm.generate(prompts, params)]

    def close(self) -> None:
        self._llm.close()


def _weight_bytes(spec: SystemSpec) -> int:
    """Of all processes together."""
    config = read_config(spec.model_dir)
    sizes = sizes_of(config, spec.dtype, quantization=spec.quantization, expert_quantization=spec.quantization)
    return sizes.dense_bytes + len(config.sparse_layers) * config.num_experts * sizes.expert_bytes


def _drafting(spec: SystemSpec) -> list[ModelConfig]:
    """The model that drafts, if one does: its keys and values take their part of the cache."""
    model = (spec.speculative_config or {}).get("model")
    return [] if model is None else [open_checkpoint(model).config]
