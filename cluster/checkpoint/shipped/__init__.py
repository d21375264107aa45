"""The models inside the package, by their names: `demo`, which deploy/demo/train.py made.

Processes that start at different times, with different versions of the package, must not mix two models: between them
the name has the files' hash behind it, `demo@1f2e3d4c5b6a`, and a process with other files refuses it.
"""

import hashlib
from pathlib import Path

from cluster.errors import CheckpointError

DEMO = "demo"
_REVISION_CHARS = 12


def is_shipped(text: str) -> bool:
    """Whether it is the name of a shipped model, with a revision or without."""
    return text.partition("@")[0] == DEMO


def pinned_name(name: str) -> str:
    """The name with the revision of the files here. Raises CheckpointError for a name with another revision."""
    shipped_directory(name)
    return f"{DEMO}@{_revision(_directory())}"


def shipped_directory(name: str) -> Path:
    """Raises CheckpointError for a name with a revision that this installation does not have."""
    directory = _directory()
    _, at, revision = name.partition("@")
    found = _revision(directory) if at else ""
    if revision != found:
        raise CheckpointError(
            f"{name} is not in this installation of moe-cluster, which has {DEMO}@{found}: install the same version "
            "on every node, and deploy again"
        )
    return directory


def _directory() -> Path:
    return Path(__file__).resolve().parent / DEMO


def _revision(directory: Path) -> str:
    """Of the contents of all files but the description."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:_REVISION_CHARS]
