"""GPUs by their published figures, and how much of these a step reaches."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """memory_bytes, bytes_s: of its memory.  flops: a second, dense, in bfloat16.  source: of these figures."""

    name: str
    memory_bytes: float
    bytes_s: float
    flops: float
    source: str


# Where a sheet has the figure with sparsity alone, it is halved.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="b200", memory_bytes=180e9, bytes_s=8e12, flops=2250e12, source="NVIDIA DGX B200 data sheet, of 8"),
        Gpu(name="h200", memory_bytes=141e9, bytes_s=4.8e12, flops=989e12, source="NVIDIA H200 data sheet, SXM"),
        Gpu(name="h100", memory_bytes=80e9, bytes_s=3.35e12, flops=989e12, source="NVIDIA H100 data sheet, SXM"),
        Gpu(name="a100-80g", memory_bytes=80e9, bytes_s=2.039e12, flops=312e12, source="NVIDIA A100 data sheet, SXM"),
        Gpu(name="l40s", memory_bytes=48e9, bytes_s=0.864e12, flops=362e12, source="NVIDIA L40S data sheet"),
        Gpu(name="l4", memory_bytes=24e9, bytes_s=0.3e12, flops=121e12, source="NVIDIA L4 data sheet"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """memory, compute: shares of a GPU's figures.  layer_s, row_s: that a layer of a split model takes beside, and a
    row of a step in all layers.  crossing_s: of a layer, to the shards and back."""

    memory: float
    compute: float
    layer_s: float
    row_s: float
    crossing_s: float


# One H200, Qwen1.5-MoE-A2.7B, BENCHMARKS.md "On a GPU". memory: a plain read of 4.2 of 4.8 TB/s. row_s: steps of 1 and
# of 192 sequences, 3.68 and 20.4 ms, less the reading of weights and cache: 1.1 and 7.2. layer_s: without graphs, which
# a split model does without, 18.6 ms a step of 32 sequences and 24 layers, less 5.8 of reading and 1.6 of rows.
# crossing_s: the same split over two shards, 47.8 ms; all three processes took turns on that one GPU, so with a GPU
# each it may be less. compute: what 4.73 requests/s of 1000 and 1000 tokens leave to the prompts.
MEASURED = Reach(memory=0.875, compute=0.175, layer_s=0.00047, row_s=0.00005, crossing_s=0.0012)


def find_gpu(name: str) -> Gpu:
    """Raises SetupError."""
    if name.lower() not in GPUS:
        raise SetupError(f"--gpu {name} is not in the table: {', '.join(GPUS)} are")
    return GPUS[name.lower()]
