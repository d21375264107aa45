"""Finds the safetensors files of a directory and reads their headers. Knows no model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.checkpoint.files import check_file, in_one_line, is_there, read_json_object, some
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_FOREIGN = ("pytorch_model*.bin", "*.pth", "*.pt", "*.gguf", "tf_model*.h5", "flax_model*.msgpack")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file's header has it. dtype: in safetensors' words."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def holds_weights(model_dir: Path) -> bool:
    """Whether any weights are there, in a format that is read or in another; False for a config.json alone."""
    patterns = (*_FOREIGN, "*.safetensors", INDEX_FILE, "adapter_config.json")
    return any(next(model_dir.glob(pattern), None) is not None for pattern in patterns)


def locate_tensors(model_dir: Path) -> dict[str, Path]:
    """Finds each tensor's file. A single file goes before an index, as in transformers; files without an index are all
    read, as in vLLM. Raises CheckpointError."""
    if is_there(model_dir / SINGLE_FILE):
        return dict.fromkeys(read_header(model_dir / SINGLE_FILE), model_dir / SINGLE_FILE)
    if is_there(model_dir / INDEX_FILE):
        return _read_index(model_dir / INDEX_FILE)
    paths = sorted(model_dir.glob("*.safetensors"))
    if is_there(model_dir / "adapter_config.json"):
        raise CheckpointError(
            f"{model_dir} holds an adapter, not a whole model: merge it into its base (peft: merge_and_unload) "
            "and save that"
        )
    if not paths:
        raise CheckpointError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}: {_advice(model_dir)}")
    _check_parts(model_dir, paths)
    files: dict[str, Path] = {}
    for path in paths:
        for name in read_header(path):
            if name in files:
                raise CheckpointError(
                    f"{model_dir}: {some([name], 'is', 'are')} in {files[name].name} and in {path.name}, and no "
                    f"{INDEX_FILE} says which counts: remove the file that does not belong to this checkpoint"
                )
            files[name] = path
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of one file; reads none. Raises CheckpointError."""
    with open_weights(path) as file:
        try:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            return {name: StoredTensor(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} has a header that cannot be read ({in_one_line(error)})") from error


def open_weights(path: Path) -> Any:
    """Maps one file, a `safe_open` (whose methods have no annotations). A truncated file fails here."""
    check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({in_one_line(error)}): download it again"
        ) from error


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty: download it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: weight_map gives {shown(file_name)} for {shown(name)}, a name without a directory is needed"
            )
    absent = sorted(name for name in set(weight_map.values()) if not _is_file(index.parent / name))
    if absent:
        raise CheckpointError(
            f"{index} names {some(absent, 'which is', 'which are')} not there: download the missing files"
        )
    return {name: index.parent / file_name for name, file_name in weight_map.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _check_parts(model_dir: Path, paths: list[Path]) -> None:
    """Raises CheckpointError where files are numbered and one is missing."""
    for path in paths:
        part = _PART.fullmatch(path.name)
        if part is None:
            continue
        names = [f"{part[1]}-{i:05d}-of-{part[3]}.safetensors" for i in range(1, int(part[3]) + 1)]
        absent = [name for name in names if not is_there(model_dir / name)]
        if absent:
            raise CheckpointError(f"{model_dir}: {some(absent, 'is', 'are')} missing: download the missing files")


def _advice(model_dir: Path) -> str:
    found = sorted(path.name for pattern in _FOREIGN for path in model_dir.glob(pattern))
    if not found:
        return "only safetensors weights are read"
    return (
        f"only safetensors weights are read, not {found[0]}: convert it (transformers: "
        "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…))"
    )
