"""Puts huggingface_hub's errors into one line each: the hub's, the network's or the disk's fault, and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by its version
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)

from cluster.checkpoint.files import in_one_line
from cluster.checkpoint.hub.name import HubName
from cluster.errors import CheckpointError

_OTHER_DISK = "make room there, or set HF_HOME to a folder on a larger disk"
_FOREIGN = (
    OSError, HTTPError, RevisionResolutionError, EntryNotFoundError, SafetensorsParsingError,
    RuntimeError,  # hf_xet's: it has no class of its own for them
    AssertionError, LookupError, TypeError, ValueError,  # the library's over an answer that no hub gives
)  # fmt: skip


@contextmanager
def in_words(name: HubName, file: str = "") -> Iterator[None]:
    """Raises CheckpointError for the library's errors inside the block. file: the one that is asked for."""
    try:
        yield
    except _FOREIGN as error:
        raise CheckpointError(f"{name}: {_reason(name, file, error)}") from error


def no_room(name: HubName, needed_bytes: int, free_bytes: int) -> CheckpointError:
    """For files that the cache's disk cannot hold."""
    return CheckpointError(
        f"{name}: {needed_bytes / 1e9:.1f} GB are to be downloaded, and {constants.HF_HUB_CACHE} has room for "
        f"{free_bytes / 1e9:.1f} GB: {_OTHER_DISK}"
    )


def _reason(name: HubName, file: str, error: BaseException) -> str:
    hub, wanted = constants.ENDPOINT, file or "it"
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError) and error.__cause__ is not None:
        error = error.__cause__  # why the hub was of no help
    match error:
        case OfflineModeIsEnabled():
            return (
                f"{wanted} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it: start "
                "once without it, or give a revision that is there"
            )
        case GatedRepoError():
            return (
                f"it is gated: accept its terms at {hub}/{name.repository}, and set HF_TOKEN to a token of the account "
                "that did (or run `hf auth login`)"
            )
        case RepositoryNotFoundError():
            return (
                f"{hub} has no such model, or shows it to nobody without a token, and there is no such directory here: "
                "check the name, and for a private model set HF_TOKEN"
            )
        case RevisionNotFoundError():
            return f"{hub}/{name.repository} has no such branch, tag or commit: check what follows the @"
        case EntryNotFoundError():
            return f"{wanted} is not in it: check the name, or give another revision"
        case HfHubHTTPError():
            return _refused(hub, wanted, error.response.status_code)
        case HTTPError():
            return (
                f"{hub} cannot be reached ({in_one_line(error) or type(error).__name__}), and {wanted} is not in the "
                "cache: check the network, https_proxy and HF_ENDPOINT"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"{constants.HF_HUB_CACHE} has no room for {wanted}: {_OTHER_DISK}"
        case OSError(errno=number) if number:
            return (
                f"{wanted} cannot be written to {error.filename or constants.HF_HUB_CACHE} ({error.strerror}): set "
                "HF_HOME to a folder that this user may write"
            )
        case RuntimeError():
            return (
                f"{wanted} cannot be fetched from the hub's Xet storage ({in_one_line(error)}): check the network, or "
                f"set HF_HUB_DISABLE_XET=1 to take it from {hub} itself"
            )
    return (
        f"{wanted} cannot be fetched from {hub} ({type(error).__name__}: {in_one_line(error)}): start again, or check "
        "HF_ENDPOINT"
    )


def _refused(hub: str, wanted: str, status: int) -> str:
    if status in (401, 403):
        return f"{hub} refuses this token or caller ({status}): set HF_TOKEN to a valid one, or unset it"
    if status == 429:
        return f"{hub} has had too many requests from here (429): try again later; with HF_TOKEN set more are allowed"
    return f"{hub} answers with {status} for {wanted}: try again later, or check HF_ENDPOINT"
