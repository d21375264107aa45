"""Reads a checkpoint's directory: its config, its index, and only the tensors that a caller names.

Knows nothing of modules or devices: `model/` and `experts/` allocate what they want to have filled.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.checkpoint.files import check_directory, read_json_object, some
from cluster.checkpoint.fused import Source, is_fused, lies_transposed, partner_of, transposed
from cluster.checkpoint.hub.name import NAME_FORMS
from cluster.checkpoint.names import EMBEDDING, HEAD, find_source, is_harmless, stored_shapes
from cluster.checkpoint.prefixes import published_names
from cluster.checkpoint.weights import (
    CONFIG_FILE,
    INDEX_FILE,
    SAFETENSORS,
    SINGLE_FILE,
    Format,
    LocalFiles,
    StoredTensor,
    WeightFiles,
    check_tensor,
)
from cluster.config import ModelConfig, read_model_config
from cluster.config.architectures.architecture import Shapes
from cluster.config.gptq import Gptq
from cluster.config.json_keys import shown
from cluster.config.model import given_dtype
from cluster.config.rope import with_rope_scaling
from cluster.config.tensor_parallel import Span, Spans
from cluster.errors import CheckpointError

if TYPE_CHECKING:  # whoever only describes a checkpoint does without torch
    from torch import Tensor

__all__ = ["CONFIG_FILE", "INDEX_FILE", "SINGLE_FILE", "CheckpointReader", "read_config", "read_json_object"]

log = logging.getLogger(__name__)

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class CheckpointReader:
    """A directory as published: config.json and safetensors files, or files of another `Format`.

    config: as the file has it, except where the tensors decide: embeddings are tied only if one of the two is stored
    (as in transformers), and the tensors give the dtype if the file names none.
    names: of all stored tensors, as published ones (`prefixes.py`), from the index, or from the files' headers.

    Opening reads JSON, and headers where there is no index; no tensor. Several threads may load at once.
    Raises CheckpointError for a directory that cannot be served.
    """

    def __init__(
        self,
        model_dir: str | Path,
        rope_scaling: Mapping[str, Any] | None = None,
        files: WeightFiles | None = None,
        *,
        weights: Format = SAFETENSORS,
    ) -> None:
        """files: of a directory that may lack files with tensors; by default it lacks none."""
        self.model_dir = Path(model_dir)
        raw, config = read_config(self.model_dir, rope_scaling)
        self._source = files or LocalFiles(self.model_dir)
        self._format = weights
        self._files = weights.locate(self._source)  # by stored name
        if not self._files:
            raise CheckpointError(f"{self.model_dir}: no tensor is in its {weights.name} files: download them again")
        self._stored = published_names(self._files)
        self.names: frozenset[str] = frozenset(self._stored)
        if config.tie_word_embeddings and {EMBEDDING, HEAD} <= self.names:
            log.info("%s: %s is stored beside tied embeddings: it is the head", self.model_dir, HEAD)
            config = replace(config, tie_word_embeddings=False)
        if given_dtype(raw) is None:
            config = replace(config, dtype=_common_dtype(self._headers()))
        self.config = config
        # GPTQ's files have a bias for each layer, zero where the model has none.
        has_biases = config.stored is not None and isinstance(config.stored.form, Gptq)
        shapes = stored_shapes(config, self.names) if has_biases else {}
        layers = {name.removesuffix("qweight") for name in shapes if name.endswith(".qweight")}
        self._empty_biases = (self.names & {f"{layer}bias" for layer in layers}) - shapes.keys()

    def check_names(self) -> None:
        """Compares the tensors' names with those that the config implies; reads no file.

        Raises CheckpointError that names the first missing and the first superfluous ones.
        """
        self._check_names(stored_shapes(self.config, self.names))

    def check_tensors(self) -> None:
        """As `check_names`, and every file's header: each tensor in one file, in its shape, in a dtype that is read.

        Reads no tensor. Leaves the headers to `load` where one is elsewhere. Raises CheckpointError.
        """
        expected = stored_shapes(self.config, self.names)
        self._check_names(expected)
        if not all(self._source.header_is_here(path.name) for path in set(self._files.values())):
            return
        headers = self._headers()
        for name, shape in expected.items():
            partner = headers.get(partner_of(name)) if is_fused(name) else None
            if partner is not None and lies_transposed(shape, headers[name].shape, partner.shape):
                shape = transposed(shape)
            check_tensor(name, headers[name], shape)
        ignored = sorted(self.names - expected.keys() - self._empty_biases)
        if ignored:
            log.warning(
                "%s: %s not read: the config has what they are computed from",
                self.model_dir,
                some(ignored, "is", "are"),
            )
        read = {path.name for path in set(self._files.values())}
        unread = [name for name in self._source.matching("*.safetensors") if name not in read]
        if unread:
            log.warning("%s: %s not read: every tensor is in others", self.model_dir, some(unread, "is", "are"))

    def missing_bytes(self, names: Collection[str]) -> int:
        """Bytes that `fetch` would download; 0 where all files are here."""
        return self._source.missing_bytes({path.name for path in self._files_of(names)})

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None:
        """Downloads the files that hold these tensors, several at a time; `load` would do it one by one.

        progress: called with the bytes of each piece. Raises CheckpointError.
        """
        self._source.fetch({path.name for path in self._files_of(names)}, progress)

    def check_room(self) -> None:
        """Raises CheckpointError where files that are elsewhere would not find room here."""
        self._source.check_room()

    def load(
        self,
        targets: "Mapping[str, Tensor]",
        progress: Callable[[int], None] | None = None,
        spans: Spans | None = None,
    ) -> int:
        """Copies each named tensor into its destination, cast to the destination's dtype; returns bytes read.

        An expert's name finds its part of a fused tensor; the rest of that is not read, and neither is that of a tensor
        with a span.
        Mutates the destinations, which may be views and may lie on CUDA; after an error some are filled.
        progress: called after each tensor with its bytes on disk.
        Files are mapped, each once and only those that hold a wanted tensor, and read in the order of their
        offsets. On the CPU nothing is allocated beside the destinations, cast or not (measured: RssAnon stays
        while 32 MB tensors are copied); RssFile grows by one file's wanted tensors, which are page cache, and
        falls when the file is closed.
        Raises CheckpointError, naming the tensor, for one that is absent, misshapen or of an unserved dtype.
        """
        import torch

        biases = {
            bias: torch.empty(target.shape[1])
            for name, target in targets.items()
            if name.endswith(".qweight") and (bias := f"{name.removesuffix('qweight')}bias") in self._empty_biases
        }
        num_bytes = self._load({**targets, **biases}, progress, spans or {})
        for name, numbers in biases.items():
            if bool(numbers.any()):
                raise CheckpointError(f"{self.model_dir}: {name} is not zero, and {CONFIG_FILE} has no such bias")
        return num_bytes

    def _load(self, targets: "Mapping[str, Tensor]", progress: Callable[[int], None] | None, spans: Spans) -> int:
        from cluster.checkpoint.copying import StoredFile, copy_tensor

        wanted: dict[Path, dict[str, list[tuple[Source, Tensor, Span | None]]]] = {}
        for name, source in self._sources(targets).items():
            stored_name = self._stored[source.name]
            of_file = wanted.setdefault(self._files[stored_name], {})
            of_file.setdefault(stored_name, []).append((source, targets[name], spans.get(name)))
        num_bytes = 0
        for path, parts in sorted(wanted.items()):
            self._source.fetch([path.name])
            with self._format.open(path) as file:
                ordered = [name for name in file.offset_keys() if name in parts]
                if len(ordered) < len(parts):
                    raise _not_in_file(path, sorted(parts.keys() - set(ordered)))
                for name in ordered:
                    stored, wanted_parts = StoredFile(path, file, name), parts[name]
                    for source, target, span in sorted(wanted_parts, key=lambda one: (one[0].expert_id, one[0].half)):
                        part_bytes = copy_tensor(stored, source, target, self._partner_shape, span)
                        num_bytes += part_bytes
                        if progress is not None:
                            progress(part_bytes)
        return num_bytes

    def _sources(self, names: Collection[str]) -> dict[str, Source]:
        """Where the tensors lie. Raises CheckpointError for absent ones."""
        found = {name: find_source(name, self.names, tied=self.config.tie_word_embeddings) for name in names}
        absent = [name for name, source in found.items() if source is None]
        if absent:
            raise CheckpointError(
                f"{self.model_dir}: {some(absent, 'is', 'are')} not in the checkpoint: download it again"
            )
        return {name: source for name, source in found.items() if source is not None}

    def _files_of(self, names: Collection[str]) -> set[Path]:
        return {self._files[self._stored[source.name]] for source in self._sources(names).values()}

    def _check_names(self, expected: Shapes) -> None:
        missing = [name for name in expected if name not in self.names]
        extra = sorted(
            name for name in self.names - expected.keys() if not is_harmless(name) and name not in self._empty_biases
        )
        if missing or extra:
            faults = [f"{some(missing, 'is', 'are')} missing"] if missing else []
            faults += [f"{some(extra, 'is', 'are')} not expected"] if extra else []
            raise CheckpointError(
                f"{self.model_dir}: tensors do not match {CONFIG_FILE}: {'; '.join(faults)}: {self._advice(extra)}"
            )

    def _advice(self, extra: list[str]) -> str:
        if not self.config.qkv_bias and any(name.endswith("_proj.bias") for name in extra):
            return "qkv_bias is false there: make it true, for biases that are stored were trained"
        if any(".lora_" in name for name in extra):
            return "an adapter lies beside its base: merge it (peft: merge_and_unload) and save that"
        return "download the checkpoint again, or put the config beside it that belongs to it"

    def _headers(self) -> dict[str, StoredTensor]:
        """Of all stored tensors. Raises CheckpointError where files and index do not agree."""
        located: dict[Path, set[str]] = {}
        for name, path in self._files.items():
            located.setdefault(path, set()).add(name)
        in_files = {path: self._format.header(self._source, path.name) for path in sorted(located)}
        for path, in_file in in_files.items():
            absent = sorted(located[path] - in_file.keys())
            if absent:
                raise _not_in_file(path, absent)
        for path, in_file in in_files.items():
            unknown = sorted(in_file.keys() - self._files.keys())
            if unknown:
                raise CheckpointError(
                    f"{path}: {some(unknown, 'is', 'are')} in this file and not in the index: download both again"
                )
            twice = sorted(in_file.keys() - located[path])
            if twice:
                raise CheckpointError(
                    f"{self.model_dir}: {some(twice[:1], 'is', 'are')} in {self._files[twice[0]].name}, as "
                    f"the index says, and in {path.name} as well: download both again"
                )
        return {name: in_files[self._files[stored]][stored] for name, stored in self._stored.items()}

    def _partner_shape(self, name: str) -> tuple[int, ...] | None:
        stored_name = self._stored.get(partner_of(name))
        if stored_name is None:
            return None
        return self._format.header(self._source, self._files[stored_name].name)[stored_name].shape


def read_config(model_dir: Path, rope_scaling: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], ModelConfig]:
    """Returns a directory's config.json, raw and normalized, with `rope_scaling` in place of its own.

    Raises CheckpointError.
    """
    check_directory(model_dir, f"{CONFIG_FILE}, or a model's name on the hub: {NAME_FORMS}")
    raw = read_json_object(model_dir / CONFIG_FILE)
    try:
        return raw, read_model_config(raw if rope_scaling is None else with_rope_scaling(raw, rope_scaling))
    except CheckpointError as error:
        changed = "" if rope_scaling is None else f" with rope_scaling {shown(rope_scaling)}"
        raise CheckpointError(f"{model_dir}{changed}: {error}") from error


def _not_in_file(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: {some(names, 'is', 'are')} not in this file, but the index says so: download both again"
    )


def _common_dtype(headers: Mapping[str, StoredTensor]) -> str:
    """The smallest dtype that holds every tensor, as in vLLM; float32 where no tensor has a served one."""
    found = {_DTYPES[tensor.dtype] for tensor in headers.values() if tensor.dtype in _DTYPES}
    if len(found) == 1:
        return found.pop()
    return "float64" if "float64" in found else "float32"  # neither 16-bit dtype holds the other
