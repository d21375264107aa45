"""Reads a LoRA adapter's directory as PEFT saves it, and compares it with its base before anything of it is loaded.

Knows nothing of modules or devices. r: rank, K: inputs, N: outputs.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cluster.checkpoint.files import check_directory, in_one_line, is_there, read_json_object, some
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.spans import Cut
from cluster.checkpoint.weights import ITEM_BYTES, StoredTensor, open_weights, read_header
from cluster.config import DTYPE_BYTES, ModelConfig
from cluster.config.architectures.architecture import Shapes
from cluster.config.lora import ADAPTER_CONFIG, LoraConfig, read_lora_config
from cluster.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"
SERVED = (
    "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, of routed experts too, gate, "
    "shared_expert_gate, embed_tokens and lm_head"
)
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
EVERYTHING: Mapping[str, Cut] = {}
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_((?P<half>[AB])(\.default)?\.weight|embedding_(?P<side>[AB])(\.default)?)"
)
_OF_BASE = re.compile(r"base_model\.model\.(?P<module>(model\.)?embed_tokens|lm_head)\.base_layer\.weight")
_MODULE = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(shared_expert\.)?(gate|up|down)_proj|"
    r"mlp\.(shared_expert_)?gate)|model\.embed_tokens|lm_head"
)
_OF_EXPERT = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapter's part of one layer. shape: N and K, of embeddings their width and the vocabulary.
    a, b: the stored names of its matrices."""

    shape: tuple[int, int]
    rank: int
    scale: float
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """modules: by the names of the base's layers."""

    directory: Path
    modules: Mapping[str, AdapterModule]

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())

    @property
    def has_experts(self) -> bool:
        """Whether it changes routed experts, which shards hold."""
        return any(_OF_EXPERT.fullmatch(name) for name in self.modules)

    @property
    def experts(self) -> frozenset[tuple[int, int]]:
        """The layer and the number of each routed expert that it changes."""
        found = (_OF_EXPERT.fullmatch(name) for name in self.modules)
        return frozenset((int(match["layer"]), int(match["expert"])) for match in found if match is not None)

    def num_bytes(self, dtype: str, *, experts: bool = False, cuts: Mapping[str, Cut] = EVERYTHING) -> int:
        """Bytes of its matrices in memory: those for attention replicas, or those of all routed experts. cuts: as of
        `read`."""
        numbers = 0
        for name, module in self.modules.items():
            if (_OF_EXPERT.fullmatch(name) is not None) == experts:
                parts = zip(module.shape, _cut(name, cuts), strict=True)
                numbers += module.rank * sum(len(range(size)[part]) for size, part in parts)
        return numbers * DTYPE_BYTES[dtype]

    def read(self, names: Collection[str], cuts: Mapping[str, Cut] = EVERYTHING) -> "dict[str, tuple[Tensor, Tensor]]":
        """The matrices of some modules: A [r, K], and B [N, r] times its factor, in float32. Raises CheckpointError.

        cuts: of the base's weights, by their names, of those that are wanted in part: of these A's columns, B's rows.
        """
        path, found = self.directory / ADAPTER_FILE, {}
        with open_weights(path) as file:
            for name in names:
                module = self.modules[name]
                rows, columns = _cut(name, cuts)
                try:
                    a, b = file.get_slice(module.a)[:, columns].float(), file.get_slice(module.b)[rows].float()
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: {name} cannot be read: {in_one_line(error)}") from error
                found[name] = a, b * module.scale
        return found


def open_adapter(directory: str | Path, base: ModelConfig, max_rank: int) -> StoredAdapter:
    """Reads adapter_config.json and the header of its tensors. Raises CheckpointError for an adapter that is damaged,
    that belongs to another base, that changes more than is computed here, or of a higher rank."""
    directory = Path(directory)
    check_directory(directory, f"adapter, with {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    where, path = directory / ADAPTER_CONFIG, directory / ADAPTER_FILE
    config = read_lora_config(read_json_object(where), str(where))
    if not is_there(path):
        raise CheckpointError(f"{directory} has no {ADAPTER_FILE}: only safetensors weights are read")
    header = read_header(path)
    shapes = checkpoint_shapes(base)
    pairs = _pairs(_without_base(header, path, shapes), path)
    if base.tie_word_embeddings and base.head.generates:
        _check_not_tied(pairs, path)
    modules = {
        name: _module(name, halves, header, config=config, shapes=shapes) for name, halves in sorted(pairs.items())
    }
    adapter = StoredAdapter(directory, modules)
    if adapter.max_rank > max_rank:
        raise CheckpointError(
            f"{directory} has rank {adapter.max_rank}, max_lora_rank is {max_rank}: serve with a higher one"
        )
    _check_complete(adapter, config, shapes)
    return adapter


def _cut(name: str, cuts: Mapping[str, Cut]) -> Cut:
    """The outputs and the inputs that are wanted."""
    rows, columns = cuts.get(f"{name}.weight", (slice(None), slice(None)))
    return (columns, rows) if name == EMBEDDINGS else (rows, columns)


def _full_name(module: str) -> str:
    """In a checkpoint; that of an adapter whose base was saved without a head lacks the beginning."""
    return f"model.{module}" if module.startswith(("layers.", "embed_tokens")) else module


def _without_base(header: Mapping[str, StoredTensor], path: Path, shapes: Shapes) -> dict[str, StoredTensor]:
    """Leaves out the base's own matrices, which PEFT saves beside those of embeddings and heads. Raises CheckpointError
    where they have other sizes than the base's here."""
    found = dict(header)
    for stored, tensor in header.items():
        if match := _OF_BASE.fullmatch(stored):
            expected = shapes.get(f"{_full_name(match['module'])}.weight")
            if expected is not None and tensor.shape != expected:
                raise CheckpointError(
                    f"{path}: {stored} has shape {list(tensor.shape)}, the base's is {list(expected)}: it is for "
                    "another base, or one with more tokens"
                )
            del found[stored]
    return found


def _check_not_tied(pairs: Collection[str], path: Path) -> None:
    """Raises CheckpointError where the one matrix that is both embeddings and head would be changed in one of them."""
    for name in (EMBEDDINGS, HEAD):
        if name in pairs:
            raise CheckpointError(
                f"{path} changes {name}, which in this base is embeddings and head at once: that is not served, merge "
                "this one into its base (peft: merge_and_unload)"
            )


def _pairs(header: Mapping[str, StoredTensor], path: Path) -> dict[str, dict[str, str]]:
    """The stored names of each module's A and B."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for stored in header:
        match = _TENSOR.fullmatch(stored)
        if match is None:
            unknown.append(stored)
            continue
        found.setdefault(_full_name(match["module"]), {})[match["half"] or match["side"]] = stored
    if unknown:
        raise CheckpointError(
            f"{path}: {some(sorted(unknown), 'is', 'are')} no LoRA matrices of a layer: only those are served"
        )
    if not found:
        raise CheckpointError(f"{path} has no tensors: save the adapter again")
    for module, halves in found.items():
        if len(halves) < 2:
            raise CheckpointError(f"{path}: {module} has only one of lora_A and lora_B: save the adapter again")
    return found


def _module(
    name: str, halves: Mapping[str, str], header: Mapping[str, StoredTensor], *, config: LoraConfig, shapes: Shapes
) -> AdapterModule:
    """Raises CheckpointError unless the base has such a layer, and it is served with an adapter."""
    a, b = header[halves["A"]], header[halves["B"]]
    base = shapes.get(f"{name}.weight")
    if base is None or len(base) != 2:
        raise CheckpointError(f"{a.path} changes {name}, which the base does not have: it is for another base")
    if not _MODULE.fullmatch(name) and not _OF_EXPERT.fullmatch(name):
        raise CheckpointError(
            f"{a.path} changes {name}, which is not served: train an adapter for {SERVED}, or merge this one into its "
            "base (peft: merge_and_unload)"
        )
    for tensor in (a, b):
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{a.path}: {name} has dtype {tensor.dtype}, {', '.join(ITEM_BYTES)} are served")
    rank = config.rank_of(name)
    num_outputs, num_inputs = reversed(base) if name == EMBEDDINGS else base
    expected = (rank, num_inputs), (num_outputs, rank)
    if (a.shape, b.shape) != expected:
        raise CheckpointError(
            f"{a.path}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, for rank {rank} the base needs "
            f"{list(expected[0])} and {list(expected[1])}: it is for another base, or another {ADAPTER_CONFIG}"
        )
    return AdapterModule(
        shape=(num_outputs, num_inputs), rank=rank, scale=config.scale_of(name), a=halves["A"], b=halves["B"]
    )


def _check_complete(adapter: StoredAdapter, config: LoraConfig, shapes: Shapes) -> None:
    """Raises CheckpointError where the config's targets and the tensors do not agree."""
    path = adapter.directory / ADAPTER_FILE
    extra = [name for name in adapter.modules if not config.targets(name)]
    if extra:
        raise CheckpointError(f"{path}: {some(extra, 'is', 'are')} not among the target_modules of {ADAPTER_CONFIG}")
    if config.is_partial or config.target_modules == "all-linear":
        return
    served = [name.removesuffix(".weight") for name in shapes]
    kinds = [_MODULE, _OF_EXPERT] if adapter.has_experts else [_MODULE]  # transformers 5 has no layers for experts
    absent = [
        name
        for name in served
        if any(kind.fullmatch(name) for kind in kinds) and config.targets(name) and name not in adapter.modules
    ]
    if absent:
        raise CheckpointError(
            f"{path}: {some(absent, 'is', 'are')} among the target_modules of {ADAPTER_CONFIG} and not in this file: "
            "save the adapter again"
        )
