"""LoRA adapters in memory: one loaded for a model, and those that a step's rows use. Knows no engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from cluster.checkpoint.adapters import EMBEDDINGS, EVERYTHING, HEAD, StoredAdapter
from cluster.checkpoint.spans import Cut
from cluster.config.lora import AdapterSource
from cluster.kernels.lora import LowRank, LowRankRows
from cluster.kernels.weights import weight_maker
from cluster.model.decoder import CausalLM
from cluster.model.layers.linear import Linear
from cluster.model.layers.lora import Changes, LayerAdapters
from cluster.model.layers.moe import Router


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """layers: its changes of each layer, without the routed experts: has_experts says whether it changes those too."""

    source: AdapterSource
    layers: Sequence[Changes]
    has_experts: bool = False
    embeddings: LowRankRows | None = None
    head: LowRank | None = None

    @property
    def salt(self) -> bytes:
        """Of the cache blocks of its sequences; two that are loaded never have the same."""
        return blake2b(f"{self.source.number} {self.source.name}".encode(), digest_size=32).digest()

    @property
    def num_bytes(self) -> int:
        of_layers = [change for changes in self.layers for change in changes.values()]
        return sum(change.nbytes for change in (*of_layers, self.embeddings, self.head) if change is not None)


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of a micro-batch. rows: [M] int64 on the model's device, of each.
    owners: as they were given, with each one's number of rows."""

    num_rows: int
    rows: Sequence[tuple[Tensor, Adapter]]
    owners: Sequence[tuple[Adapter | None, int]]

    def layer(self, layer_id: int) -> LayerAdapters:
        return LayerAdapters(self.num_rows, [(rows, adapter.layers[layer_id]) for rows, adapter in self.rows])

    def embed(self, token_ids: Tensor, out: Tensor) -> None:
        """Adds to `out` [T, H], the embeddings of token_ids [T], in place."""
        for rows, adapter in self.rows:
            if adapter.embeddings is not None:
                out.index_add_(0, rows, adapter.embeddings.product(token_ids[rows]))

    def add_logits(self, x: Tensor, out: Tensor) -> None:
        """Adds to `out` [T, V], the logits of x [T, H], in place."""
        for rows, adapter in self.rows:
            if adapter.head is not None:
                out.index_add_(0, rows, adapter.head.product(x.index_select(0, rows)))


def load_adapter(
    model: CausalLM, stored: StoredAdapter, source: AdapterSource, cuts: Mapping[str, Cut] = EVERYTHING
) -> Adapter:
    """Reads the matrices for all layers of a model, in its dtype and on its device. Blocks. Raises CheckpointError.

    cuts: as of `StoredAdapter.read`, of a model that is a part.
    """
    norm = model.model.norm.weight
    make = weight_maker(norm.dtype, norm.device)
    layers: list[Mapping[str, LowRank]] = []
    for layer_id, layer in enumerate(model.model.layers):
        changes: dict[str, LowRank] = {}
        for path, module in layer.named_modules():
            if not isinstance(module, Linear | Router):
                continue
            prefix = f"model.layers.{layer_id}.{path.removesuffix(path.rpartition('.')[2])}"
            wanted = {f"{prefix}{part}": part for part in module.outputs if f"{prefix}{part}" in stored.modules}
            if wanted:
                found = {wanted[full]: pair for full, pair in stored.read(wanted, cuts).items()}
                changes[path] = LowRank(found, module.outputs, make)
        layers.append(changes)
    of_words = stored.read([name for name in (EMBEDDINGS, HEAD) if name in stored.modules], cuts)
    embeddings = head = None
    if EMBEDDINGS in of_words:
        embeddings = LowRankRows(*of_words[EMBEDDINGS], model.model.embed_tokens.weight, make)
    if HEAD in of_words:
        head = LowRank({HEAD: of_words[HEAD]}, {HEAD: model.config.vocab_size}, make)
    return Adapter(source, layers, stored.has_experts, embeddings, head)


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
    owners = list(zip(adapters, num_tokens, strict=True))
    return StepAdapters(start, [(torch.cat(parts).to(device), adapter) for adapter, parts in rows.items()], owners)


def head_adapters(
    adapters: Sequence[Adapter | None], num_rows: Sequence[int], device: torch.device
) -> StepAdapters | None:
    """As `step_adapters`, of those that change the head."""
    changing = [adapter if adapter is not None and adapter.head is not None else None for adapter in adapters]
    return step_adapters(changing, num_rows, device) if any(changing) else None
