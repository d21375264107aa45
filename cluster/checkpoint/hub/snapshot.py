"""One commit's files on the hub: the small ones at once, those with tensors when they are asked for.

They lie in huggingface_hub's cache, which all processes of a node share; it also does tokens, locks and resuming, and
reads HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and the proxies' variables. Imported only for a model's name: a
start from a directory does not pay for the library.
"""

import fnmatch
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    resolve_revision,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from cluster.checkpoint.added_tokens import ADDED_TOKENS_FILE, TOKENIZER_FILE
from cluster.checkpoint.chat_template import TEMPLATE_DIR, TEMPLATE_FILE
from cluster.checkpoint.files import in_one_line
from cluster.checkpoint.generation import GENERATION_FILE
from cluster.checkpoint.hub.faults import in_words, no_room
from cluster.checkpoint.hub.name import HubName, is_commit
from cluster.checkpoint.hub.progress import FileProgress, Progress, Silent, asking
from cluster.checkpoint.special_tokens import SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE
from cluster.checkpoint.tokenizer_files import MERGES_FILE, VOCAB_FILE
from cluster.checkpoint.weights import CONFIG_FILE, INDEX_FILE, StoredTensor, read_header
from cluster.errors import CheckpointError
from cluster.version import __version__

log = logging.getLogger(__name__)

SMALL_FILES = (
    CONFIG_FILE, GENERATION_FILE, INDEX_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, VOCAB_FILE, MERGES_FILE,
    ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE,
)  # fmt: skip
_TEMPLATE = re.compile(rf"{TEMPLATE_DIR}/\w[-.\w]*\.jinja")
LIBRARY = "moe-cluster"  # for the hub's statistics
DOWNLOADS = 4  # at a time


def resolve(name: HubName) -> HubName:
    """The name with the commit that it means now; offline, the commit that it meant last. Raises CheckpointError."""
    with asking(name), in_words(name):
        found = resolve_revision(name.repository, revision=name.revision or None).resolved
    if not is_commit(found):
        raise CheckpointError(
            f"{name}: {constants.ENDPOINT} gives {in_one_line(found)} as its commit, 40 hexadecimal digits are needed: "
            "check HF_ENDPOINT"
        )
    return replace(name, revision=found)


class Snapshot:
    """The `WeightFiles` of a name with its commit.

    directory: in the cache, with all small files once this object exists.
    Several threads may use it at once. Raises CheckpointError, as its methods do.
    """

    def __init__(self, name: HubName) -> None:
        assert name.is_commit, f"{name} may mean other files tomorrow"
        self._name = name
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        sizes, config = self._listed(), self._cached_config()
        if sizes is None or config is None:
            with asking(name), in_words(name, CONFIG_FILE):
                snapshot_download(  # it keeps the hub's list of files in the cache
                    name.repository, revision=name.revision, allow_patterns=[CONFIG_FILE], tqdm_class=Silent,
                    library_name=LIBRARY, library_version=__version__,
                )  # fmt: skip
            sizes, config = self._listed(), self._cached_config()
        if config is None:
            raise CheckpointError(
                f"{name}: {constants.ENDPOINT} lists no {CONFIG_FILE} in it: name a model for transformers, or check "
                "HF_ENDPOINT"
            )
        self.directory = config.parent
        if sizes is None:  # the cache cannot be written: there is what lies there
            sizes = {path.name: path.stat().st_size for path in self.directory.iterdir() if path.is_file()}
        self._sizes = sizes
        self.fetch([file for file in sizes if file in SMALL_FILES or _TEMPLATE.fullmatch(file)])

    @property
    def model(self) -> str:
        return str(self._name)

    def holds(self, name: str) -> bool:
        return name in self._sizes

    def is_file(self, name: str) -> bool:
        return name in self._sizes

    def matching(self, pattern: str) -> list[str]:
        return sorted(fnmatch.filter(self._sizes, pattern))

    def header_is_here(self, name: str) -> bool:
        return name in self._headers or self._is_local(name)

    def header(self, name: str) -> dict[str, StoredTensor]:
        """From the file, or from its first bytes on the hub."""
        if self._is_local(name):
            return read_header(self.directory / name)
        if name not in self._headers:
            with asking(self._name), in_words(self._name, name):
                found = HfApi().parse_safetensors_file_metadata(
                    self._name.repository, name, revision=self._name.revision
                )
            path = self.directory / name
            self._headers[name] = {
                tensor: StoredTensor(path, info.dtype, tuple(info.shape)) for tensor, info in found.tensors.items()
            }
        return self._headers[name]

    def missing_bytes(self, names: Collection[str]) -> int:
        return sum(self._sizes[name] for name in set(names) if not self._is_local(name))

    def check_room(self) -> None:
        """Raises CheckpointError where the cache's disk cannot hold the files with tensors that are not in it."""
        self._check_room(self.matching("*.safetensors"))

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None:
        """Downloads those that are not in the cache; several at a time. progress: called with each piece's bytes."""
        missing = sorted(name for name in set(names) if not self._is_local(name))
        if not missing:
            return
        self._check_room(missing)
        num_bytes = self.missing_bytes(missing)
        files = f"{len(missing)} files" if len(missing) > 1 else missing[0]
        log.info("downloading %s of %s, %s bytes in all", files, self._name, f"{num_bytes:,}")
        shown = Progress(f"downloading {files} of {self._name.repository}", num_bytes, progress)
        with ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download") as threads:
            try:
                downloads = [threads.submit(self._download, name, shown) for name in missing]
                for download in wait(downloads, return_when=FIRST_EXCEPTION).done:
                    download.result()
            except BaseException:
                shown.stop()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                shown.close()

    def _download(self, name: str, shown: Progress) -> None:
        part = FileProgress(shown, self._sizes[name])
        with in_words(self._name, name):
            hf_hub_download(
                self._name.repository, name, revision=self._name.revision, tqdm_class=part.bar(),
                library_name=LIBRARY, library_version=__version__,
            )  # fmt: skip
        part.finish()

    def _check_room(self, names: Collection[str]) -> None:
        needed = self.missing_bytes(names)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise no_room(self._name, needed, free)

    def _is_local(self, name: str) -> bool:
        """Whether it is here whole: the library links a file only then. A link into nowhere is fetched again."""
        return os.path.exists(self.directory / name)

    def _listed(self) -> dict[str, int] | None:
        """Files' sizes by name, as the hub has listed them for this cache; None before it has.

        Of files in folders only templates count, and of names only those of one file below the directory.
        """
        try:
            entries = get_cached_repo_tree(self._name.repository, revision=self._name.revision)
        except CachedRepoTreeNotFoundError:
            return None
        return {entry.path: int(entry.size or 0) for entry in entries if _is_plain(entry.path)}

    def _cached_config(self) -> Path | None:
        found = try_to_load_from_cache(self._name.repository, CONFIG_FILE, revision=self._name.revision)
        return Path(found) if isinstance(found, str) else None


def _is_plain(path: str) -> bool:
    return _TEMPLATE.fullmatch(path) is not None or ("/" not in path and path not in ("", ".", ".."))
