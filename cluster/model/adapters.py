"""LoRA adapters in memory: one loaded for a model, and those that a step's rows use. Knows no engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from cluster.checkpoint.adapters import StoredAdapter
from cluster.config.lora import AdapterSource
from cluster.kernels.lora import LowRank
from cluster.kernels.weights import weight_maker
from cluster.model.decoder import CausalLM
from cluster.model.layers.linear import Linear
from cluster.model.layers.lora import Changes, LayerAdapters


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """layers: its changes of each layer, without the routed experts: has_experts says whether it changes those too."""

    source: AdapterSource
    layers: Sequence[Changes]
    has_experts: bool = False

    @property
    def salt(self) -> bytes:
        """Of the cache blocks of its sequences; two that are loaded never have the same."""
        return blake2b(f"{self.source.number} {self.source.name}".encode(), digest_size=32).digest()

    @property
    def num_bytes(self) -> int:
        return sum(change.nbytes for changes in self.layers for change in changes.values())


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of a micro-batch. rows: [M] int64 on the model's device, of each."""

    num_rows: int
    rows: Sequence[tuple[Tensor, Adapter]]

    def layer(self, layer_id: int) -> LayerAdapters:
        return LayerAdapters(self.num_rows, [(rows, adapter.layers[layer_id]) for rows, adapter in self.rows])


def load_adapter(model: CausalLM, stored: StoredAdapter, source: AdapterSource) -> Adapter:
    """Reads the matrices for all layers of a model, in its dtype and on its device. Blocks. Raises CheckpointError."""
    norm = model.model.norm.weight
    make = weight_maker(norm.dtype, norm.device)
    layers: list[Mapping[str, LowRank]] = []
    for layer_id, layer in enumerate(model.model.layers):
        changes: dict[str, LowRank] = {}
        for path, module in layer.named_modules():
            if not isinstance(module, Linear):
                continue
            prefix = f"model.layers.{layer_id}.{path.removesuffix(path.rpartition('.')[2])}"
            wanted = {f"{prefix}{part}": part for part in module.outputs if f"{prefix}{part}" in stored.modules}
            if wanted:
                found = {wanted[full]: pair for full, pair in stored.read(wanted).items()}
                changes[path] = LowRank(found, module.outputs, make)
        layers.append(changes)
    return Adapter(source, layers, stored.has_experts)


def step_adapters(
    adapters: Sequence[Adapter | None], num_tokens: Sequence[int], device: torch.device
) -> StepAdapters | None:
    """Those of a micro-batch's sequences, each with its number of rows; None where no sequence has one."""
    rows: dict[Adapter, list[Tensor]] = {}
    start = 0
    for adapter, count in zip(adapters, num_tokens, strict=True):
        if adapter is not None:
            rows.setdefault(adapter, []).append(torch.arange(start, start + count))
        start += count
    if not rows:
        return None
    return StepAdapters(start, [(torch.cat(parts).to(device), adapter) for adapter, parts in rows.items()])
