"""Finds a model's files by what a user calls it: a directory's path, a name on the hub, or `demo`, in the package.

Reads none of them.
"""

import os
from pathlib import Path

from cluster.checkpoint.hub.name import HubName, parse_name
from cluster.checkpoint.shipped import is_shipped, pinned_name, shipped_directory
from cluster.checkpoint.weights import LocalFiles, WeightFiles
from cluster.errors import CheckpointError


def hub_name(model: str | os.PathLike[str]) -> HubName | None:
    """The name on the hub; None for a path and for a model of the package. An existing directory goes before a name.

    Raises CheckpointError for a text that is neither.
    """
    text = os.fspath(model)
    if not text.strip():
        raise CheckpointError(
            "the model's name is empty: give a directory (. is the current one), or a name on the hub"
        )
    return None if os.path.isdir(text) else parse_name(text)


def shipped_name(model: str | os.PathLike[str]) -> str | None:
    """The name of a model that the package has, else None. An existing directory goes before it."""
    text = os.fspath(model)
    return text if is_shipped(text) and not os.path.isdir(text) else None


def is_name(model: str | os.PathLike[str]) -> bool:
    """Whether it names a model that needs no directory of the user's. Raises CheckpointError as `hub_name`."""
    return shipped_name(model) is not None or hub_name(model) is not None


def located(model: str | os.PathLike[str]) -> str:
    """An absolute path, or a name as it is. Asks nobody. Raises CheckpointError for a text that is neither."""
    return shipped_name(model) or str(hub_name(model) or Path(model).resolve())


def pinned(model: str | os.PathLike[str]) -> str:
    """The model as all processes shall take it, so that all have the same files: a name gets its commit.

    A path stays as it is. Asks the hub about a branch or tag. Raises CheckpointError.
    """
    shipped = shipped_name(model)
    if shipped is not None:
        return pinned_name(shipped)
    name = hub_name(model)
    if name is None:
        return os.fspath(model)
    if not name.is_commit:
        from cluster.checkpoint.hub.snapshot import resolve  # the library takes its time to load

        name = resolve(name)
    return str(name)


def open_files(model: str | os.PathLike[str]) -> WeightFiles:
    """The files of a path or of a name, whose small ones are fetched here. Raises CheckpointError."""
    shipped = shipped_name(model)
    if shipped is not None:
        return LocalFiles(shipped_directory(shipped))
    name = hub_name(model)
    if name is None:
        return LocalFiles(Path(model))
    from cluster.checkpoint.hub.snapshot import Snapshot, resolve

    return Snapshot(name if name.is_commit else resolve(name))


def model_directory(model: str | os.PathLike[str]) -> Path:
    """The directory with all files but those with tensors. Raises CheckpointError."""
    return open_files(model).directory


def complete_directory(model: str | os.PathLike[str]) -> Path:
    """The directory with all files, for programs that know no names. Raises CheckpointError."""
    files = open_files(model)
    files.fetch(files.matching("*.safetensors"))
    return files.directory


def served_name(model: str | os.PathLike[str]) -> str:
    """The name that clients see: a directory's, or a model's name without a revision."""
    shipped = shipped_name(model)
    if shipped is not None:
        return shipped.partition("@")[0]
    name = hub_name(model)
    return Path(model).resolve().name if name is None else name.repository
