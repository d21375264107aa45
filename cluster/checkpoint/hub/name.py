"""Names of models on the hub: `owner/name`, and after an `@` a branch, a tag or a commit. Asks nobody."""

import re
from dataclasses import dataclass

from cluster.checkpoint.files import in_one_line
from cluster.errors import CheckpointError

EXAMPLE = "Qwen/Qwen1.5-MoE-A2.7B-Chat"
NAME_FORMS = "OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit"
MAX_REPOSITORY_CHARS, MAX_REVISION_CHARS = 96, 200

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"[A-Za-z0-9](?:[-._A-Za-z0-9]*[_A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[-._+/A-Za-z0-9]*[-_+A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub. repository: owner/name.  revision: a branch, tag or commit; "" for the default branch."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def is_commit(self) -> bool:
        """Whether it means the same files for ever."""
        return is_commit(self.revision)


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def parse_name(text: str) -> HubName | None:
    """Reads a name; None for a text that can only be meant as a path.

    Raises CheckpointError for a text with one slash that no model can have as its name.
    """
    repository, at, revision = text.partition("@")
    if text.startswith(("/", ".", "~")) or repository.count("/") != 1:
        return None
    fault = _fault(repository, revision if at else None)
    if fault:
        raise CheckpointError(
            f"{in_one_line(text)} is not a directory, and not a model's name, as {EXAMPLE} is one: {fault}"
        )
    return HubName(repository, revision)


def _fault(repository: str, revision: str | None) -> str:
    """The reason why no model has this name; "" for none. Source: huggingface_hub's rules for a repository's name."""
    if len(repository) > MAX_REPOSITORY_CHARS:
        return f"it has {len(repository)} characters, {MAX_REPOSITORY_CHARS} are allowed"
    if not all(_PART.fullmatch(part) for part in repository.split("/")):
        return "letters, digits, -, _ and . make an owner and a name, neither - nor . at an end"
    if "--" in repository or ".." in repository or repository.endswith(".git"):
        return "it must not have -- or .. in it, nor .git at its end"
    if revision is None:
        return ""
    if not revision:
        return "after the @ a branch, a tag or a commit is needed"
    if len(revision) > MAX_REVISION_CHARS:
        return f"its revision has {len(revision)} characters, {MAX_REVISION_CHARS} are allowed"
    if not _REVISION.fullmatch(revision) or any(odd in revision for odd in ("..", "//", "/.")):
        return "letters, digits, -, _, +, . and / make a branch, a tag or a commit"
    return ""
