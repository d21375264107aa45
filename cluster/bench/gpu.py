"""`moe-cluster bench gpu`: the full-size Qwen1.5-MoE-A2.7B on one GPU, in one process and split, beside its roofline.

Weights are random and drawn on the device; nothing is downloaded or written. The published figure to compare with:
2.01 requests/s of 1000 tokens in and 1000 out on one A100-80G (Qwen's blog of Qwen1.5-MoE), 55 % of its memory bound.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from cluster.bench.checkpoint import default_directory, describe, made_checkpoint, read_config
from cluster.bench.machine import this_machine
from cluster.bench.report import describe_machine, markdown_table
from cluster.bench.sampling import SAMPLINGS, Sampling
from cluster.bench.spec import SystemSpec
from cluster.bench.systems import check_shards
from cluster.bench.throughput import Workload
from cluster.bench.worker import RemoteSystem
from cluster.checkpoint.names import dense_bytes
from cluster.config import DTYPE_BYTES, ModelConfig
from cluster.config.quantization import PLAIN
from cluster.drawing import bars
from cluster.errors import ClusterError, SetupError

BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes/s, NVIDIA's data sheets (SXM, 80 GB and more)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuResult:
    """requests_per_s: of each repeat.  bound: requests/s by the memory's bandwidth alone, 0 if unknown."""

    system: str
    sampling: str
    requests_per_s: tuple[float, ...]
    bound: float

    @property
    def median(self) -> float:
        return statistics.median(self.requests_per_s)


def memory_bound(config: ModelConfig, workload: Workload, bytes_per_s: float, quantization: str = PLAIN) -> float:
    """Requests/s if each decode step read all weights and its keys and values once, and nothing else took time."""
    [batch], output = workload.batches, workload.output_tokens
    embedding = config.vocab_size * config.hidden_size * DTYPE_BYTES[config.dtype]  # looked up, not read
    dense = dense_bytes(config, config.dtype, quantization) - (0 if config.tie_word_embeddings else embedding)
    experts = len(config.sparse_layers) * config.num_experts * config.expert_bytes(config.dtype, quantization)
    cache = batch * (workload.prompt_tokens + output / 2) * config.kv_bytes_per_token(config.dtype)
    return batch * bytes_per_s / ((dense + experts + cache) * output)


def measure_gpu(args: argparse.Namespace) -> int:
    """Measures and prints; 1 when a system failed. Raises SetupError."""
    if not torch.cuda.is_available():
        raise SetupError(
            "bench gpu: torch sees no CUDA device here; run it on a machine with one and torch's CUDA build"
        )
    directory = args.checkpoint_dir or default_directory(dict(os.environ))
    model_dir = made_checkpoint("a2.7b", args.layers, directory, lambda made, total: None, with_files=False)
    config = read_config(model_dir)
    check_shards(args.shards, config)
    workload = Workload(
        batches=(args.batch,),
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        repeats=args.repeat,
        vocab_size=config.vocab_size,
    )
    name = torch.cuda.get_device_name()
    bandwidth = next((value for key, value in BANDWIDTHS.items() if key in name), 0.0)
    samplings = [SAMPLINGS[name] for name in args.sampling]
    results: list[GpuResult] = []
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        for spec in _specs(model_dir, config, args):
            bound = memory_bound(config, workload, bandwidth, spec.quantization)
            task = progress.add_task(spec.name, total=(1 + args.repeat) * len(samplings))
            try:
                advance = partial(progress.advance, task)
                results += _measure(spec, config, workload, samplings=samplings, bound=bound, advance=advance)
            except ClusterError as error:
                failures.append(f"{spec.name}: {error}")
    _print(results, failures, config, workload, bandwidth)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 1 if failures else 0


def _specs(model_dir: Path, config: ModelConfig, args: argparse.Namespace) -> list[SystemSpec]:
    """Each of `--systems` with each of `--quantization`."""
    local = SystemSpec(kind="local", model_dir=model_dir, dtype=config.dtype, num_shards=1, cuda_graphs=True)
    split = replace(local, kind="stream", num_shards=args.shards, gpus_per_shard=1 / args.shards)
    named = {"local": local, "no-graphs": replace(local, cuda_graphs=False), "stream": split}
    return [replace(named[name], quantization=weights) for weights in args.quantization for name in args.systems]


def _measure(
    spec: SystemSpec,
    config: ModelConfig,
    workload: Workload,
    *,
    samplings: Sequence[Sampling],
    bound: float,
    advance: Callable[[], None],
) -> list[GpuResult]:
    [batch] = workload.batches
    results = []
    system = RemoteSystem(spec, config, workload)
    try:
        for sampling in samplings:
            system.generate(workload.prompts(batch, 0), 2, sampling)
            advance()
            rates = []
            for run_id in range(1, 1 + workload.repeats):
                started = time.perf_counter()
                system.generate(workload.prompts(batch, run_id), workload.output_tokens, sampling)
                rates.append(batch / (time.perf_counter() - started))
                advance()
            results.append(
                GpuResult(system=spec.name, sampling=sampling.name, requests_per_s=tuple(rates), bound=bound)
            )
    finally:
        system.close()
    return results


def _print(
    results: list[GpuResult], failures: list[str], config: ModelConfig, workload: Workload, bandwidth: float
) -> None:
    print(f"{describe_machine(this_machine())}\n\nCheckpoint: {describe(config, config.dtype)}.\n")
    print(
        f"{workload.batches[0]} requests at a time, {workload.prompt_tokens} tokens in, {workload.output_tokens} out; "
        f"the bound is what memory at {bandwidth / 1e12:.2f} TB/s allows.\n"
    )
    heads = ("system", "tokens", "requests/s", "lowest-highest", "bound", "of the bound", "of the first")
    rows: list[tuple[str, ...]] = [heads]
    for result in results:
        share = f"{result.median / result.bound:.2f}" if result.bound else "-"
        spread = f"{min(result.requests_per_s):.2f}-{max(result.requests_per_s):.2f}"
        ratio = f"{result.median / results[0].median:.2f}"
        bound = f"{result.bound:.1f}" if result.bound else "-"
        rows.append((result.system, result.sampling, f"{result.median:.2f}", spread, bound, share, ratio))
    print("\n".join(markdown_table(rows)))
    for failure in failures:
        print(f"- FAILED: {failure}")
