"""Finds a checkpoint's files with tensors and reads the headers of safetensors ones. Knows no model."""

import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from cluster.checkpoint.files import check_file, in_one_line, is_there, read_json_object, some
from cluster.config.json_keys import shown
from cluster.config.stored import INTEGERS, SIZES
from cluster.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
WORD_BYTES = {"I32": 4}  # of numbers in a few bits
SIZE_BYTES = {"I64": 8, "I32": 4}  # of a shape that stands beside them

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pth", "*.pt")
_FOREIGN = ("*.gguf", "tf_model*.h5", "flax_model*.msgpack")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file's header has it. dtype: in safetensors' words."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class WeightFiles(Protocol):
    """A checkpoint's files, those with tensors above all: they may be elsewhere until they are fetched.

    directory: where they are, or will be once they are fetched.
    All but `holds`, `is_file` and `matching` raise CheckpointError.
    """

    directory: Path

    @property
    def model(self) -> str:
        """As a user calls them on the command line."""

    def holds(self, name: str) -> bool: ...

    def is_file(self, name: str) -> bool: ...

    def matching(self, pattern: str) -> list[str]:
        """Names of files, sorted."""

    def header_is_here(self, name: str) -> bool:
        """Whether `header` asks nobody."""

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Lists a safetensors file's tensors; fetches none."""

    def missing_bytes(self, names: Collection[str]) -> int:
        """Bytes that `fetch` would download."""

    def check_room(self) -> None:
        """Checks that what is elsewhere finds room here."""

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None:
        """Brings files into `directory`. Blocks. progress: called with the bytes of each piece."""


class LocalFiles:
    """All files are in a directory of the user's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def model(self) -> str:
        return str(self.directory)

    def holds(self, name: str) -> bool:
        return is_there(self.directory / name)

    def is_file(self, name: str) -> bool:
        try:
            return (self.directory / name).is_file()
        except OSError:  # a name that is too long
            return False

    def matching(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.directory.glob(pattern))

    def header_is_here(self, name: str) -> bool:
        return True

    def header(self, name: str) -> dict[str, StoredTensor]:
        return read_header(self.directory / name)

    def missing_bytes(self, names: Collection[str]) -> int:
        return 0

    def check_room(self) -> None: ...

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Format:
    """How tensors lie in files. locate: finds each tensor's file.  header: as `WeightFiles.header`.

    open: gives a file that is here, a context with `keys`, `offset_keys`, `get_tensor`, `get_slice` as of `safe_open`.
    """

    name: str
    locate: Callable[[WeightFiles], dict[str, Path]]
    header: Callable[[WeightFiles, str], dict[str, StoredTensor]]
    open: Callable[[Path], Any]


def holds_weights(files: WeightFiles) -> bool:
    """Whether any weights are there, in a format that is read or in another; False for a config.json alone."""
    return any(files.matching(p) for p in (*_FOREIGN, *PICKLED, "*.safetensors", INDEX_FILE, "adapter_config.json"))


def locate_tensors(files: WeightFiles) -> dict[str, Path]:
    """Finds each tensor's file. A single file goes before an index, as in transformers; files without an index are all
    read, as in vLLM. Raises CheckpointError."""
    model_dir = files.directory
    if files.holds(SINGLE_FILE):
        return dict.fromkeys(files.header(SINGLE_FILE), model_dir / SINGLE_FILE)
    if files.holds(INDEX_FILE):
        return read_index(files, INDEX_FILE)
    names = files.matching("*.safetensors")
    if files.holds("adapter_config.json"):
        raise CheckpointError(
            f"{model_dir} holds an adapter, not a whole model: merge it into its base (peft: merge_and_unload) "
            "and save that, or serve its base with --lora-adapters NAME=PATH"
        )
    if not names:
        raise CheckpointError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}: {_advice(files)}")
    _check_parts(files, names)
    found: dict[str, Path] = {}
    for file_name in names:
        for tensor in files.header(file_name):
            if tensor in found:
                raise CheckpointError(
                    f"{model_dir}: {some([tensor], 'is', 'are')} in {found[tensor].name} and in {file_name}, and no "
                    f"{INDEX_FILE} says which counts: remove the file that does not belong to this checkpoint"
                )
            found[tensor] = model_dir / file_name
    return found


def read_header(path: Path, open_file: Callable[[Path], Any] | None = None) -> dict[str, StoredTensor]:
    """Lists the tensors of one file; reads none. open_file: of a `Format`. Raises CheckpointError."""
    with open_file(path) if open_file else open_weights(path, "np") as file:
        try:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            return {name: StoredTensor(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} has a header that cannot be read ({in_one_line(error)})") from error


def open_weights(path: Path, framework: str = "pt") -> Any:
    """Maps one file, a `safe_open` (whose methods have no annotations). A truncated file fails here.

    framework: "pt" loads torch.
    """
    check_file(path)
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({in_one_line(error)}): download it again"
        ) from error


def read_index(files: WeightFiles, name: str) -> dict[str, Path]:
    """Each tensor's file, by an index of that name. Raises CheckpointError."""
    index = files.directory / name
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty: download it again")
    paths: dict[str, Path] = {}  # of a few names, which thousands of tensors share
    for name, file_name in weight_map.items():
        if isinstance(file_name, str) and file_name in paths:
            continue
        if not isinstance(file_name, str) or not file_name or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: weight_map gives {shown(file_name)} for {shown(name)}, a name without a directory is needed"
            )
        paths[file_name] = files.directory / file_name
    absent = sorted(file_name for file_name in paths if not files.is_file(file_name))
    if absent:
        raise CheckpointError(
            f"{index} names {some(absent, 'which is', 'which are')} not there: download the missing files"
        )
    return {name: paths[file_name] for name, file_name in weight_map.items()}


def _check_parts(files: WeightFiles, names: list[str]) -> None:
    """Raises CheckpointError where files are numbered and one is missing."""
    for name in names:
        part = _PART.fullmatch(name)
        if part is None:
            continue
        parts = [f"{part[1]}-{i:05d}-of-{part[3]}.safetensors" for i in range(1, int(part[3]) + 1)]
        absent = [other for other in parts if not files.holds(other)]
        if absent:
            raise CheckpointError(f"{files.directory}: {some(absent, 'is', 'are')} missing: download the missing files")


def _advice(files: WeightFiles) -> str:
    if pickles := find(files, PICKLED):
        return (
            f"its weights are pickled ({pickles[0]}), a format that can hold any program: `moe-cluster convert "
            f"--from-pickle {shlex.quote(files.model)} OUT` writes them as safetensors and runs none"
        )
    if others := find(files, _FOREIGN):
        return (
            f"only safetensors weights are read, not {others[0]}: convert it (transformers: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…))"
        )
    return "only safetensors weights are read"


def find(files: WeightFiles, patterns: Collection[str]) -> list[str]:
    """Names of files, sorted."""
    return sorted(name for pattern in patterns for name in files.matching(pattern))


SAFETENSORS = Format("safetensors", locate_tensors, lambda files, name: files.header(name), open_weights)


def check_tensor(name: str, found: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError for a dtype that is not read, and for a shape other than `shape`."""
    served = WORD_BYTES if name.endswith(INTEGERS) else SIZE_BYTES if name.endswith(SIZES) else ITEM_BYTES
    if found.dtype not in served:
        raise CheckpointError(
            f"{found.path}: {name} has dtype {found.dtype}, {', '.join(served)} {'is' if len(served) == 1 else 'are'} "
            "served: use the bfloat16 checkpoint"
        )
    if found.shape != shape:
        raise CheckpointError(
            f"{found.path}: {name} has shape {list(found.shape)}, {CONFIG_FILE} implies {list(shape)}: "
            "weights and config belong to different models"
        )
