"""API keys: reads the file of their hashes, finds a caller's name by its key, keeps it to its limits. Knows no gRPC.

The file has one key on each line; blank lines and the rest of a line after a # do not count:

    NAME SHA256 [requests_per_minute=N] [concurrent=N] [tokens_per_minute=N]

SHA256 is the key's hash in hex. A key has 256 random bits (`new_key`), too many to search through: a slow hash, as for
passwords, would only cost time. A minute's worth may come at once. Each ingress process counts for itself.
"""

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hmac import compare_digest
from pathlib import Path

from cluster.errors import Overloaded, SetupError, Unauthenticated
from cluster.inputs import shown
from cluster.serving.admission.token_bucket import TokenBucket

log = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0  # between two looks at the file
CONCURRENT_RETRY_S = 1.0  # by then a place may be free again
MAX_LIMIT_DIGITS = 15
LIMITS = ("requests_per_minute", "concurrent", "tokens_per_minute")

_NAME = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """sha256: of the key.  Limits: 0 means none.  tokens: of prompts and answers together."""

    name: str
    sha256: bytes
    requests_per_minute: int = 0
    concurrent: int = 0
    tokens_per_minute: int = 0


def new_key(name: str) -> tuple[str, str]:
    """Returns a fresh key and its line for the file. Raises SetupError for a name that cannot be."""
    if not _NAME.fullmatch(name):
        raise SetupError(f"{name!r} is no name for a key: at most 64 letters, digits, '-', '.' and '_' are needed")
    key = f"moe-{secrets.token_urlsafe(32)}"
    return key, f"{name} {_hash(key).hex()}"


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """source: the text's name in errors. Raises SetupError with the line's number."""
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            key = _parse_line(words, f"{source}, line {number}")
            if any(key.name == other.name or key.sha256 == other.sha256 for other in keys):
                raise SetupError(
                    f"{source}, line {number}: {key.name!r} or its hash stands in a line before: delete one"
                )
            keys.append(key)
    if not keys:
        raise SetupError(f"{source} has no key: `moe-cluster keys new NAME` makes one")
    return tuple(keys)


class _Account:
    """The use of one key so far."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.key = key
        self.running = 0
        self.requests = TokenBucket(key.requests_per_minute, now) if key.requests_per_minute else None
        self.tokens = TokenBucket(key.tokens_per_minute, now) if key.tokens_per_minute else None


class ApiKeys:
    """The keys of a file, read again when it changes. For one event loop; looks at the file once a second at most.

    clock: monotonic seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Raises SetupError."""
        self._path, self._clock = path, clock
        self._accounts: dict[str, _Account] = {}
        self._looked_s = clock()
        self._seen = self._stamp()
        self._take(self._read())

    def identify(self, authorization: str | None) -> str:
        """Returns the name of the caller's key. authorization: "Bearer KEY". Raises Unauthenticated."""
        self._reload()
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed: send it as metadata, 'authorization: Bearer KEY'")
        digest, found = _hash(key.strip()), ""
        for account in self._accounts.values():  # all of them: so the time says nothing about the key
            if compare_digest(account.key.sha256, digest):
                found = account.key.name
        if not found:
            raise Unauthenticated("this API key is not known here: ask the operator of this server for one")
        return found

    @contextmanager
    def admitted(self, name: str) -> Iterator[None]:
        """Counts a request of a key while it is open. Raises Overloaded over one of its limits."""
        account, now = self._accounts[name], self._clock()
        key = account.key
        if key.concurrent and account.running >= key.concurrent:
            raise _over(key, "concurrent", CONCURRENT_RETRY_S)
        for bucket, limit in ((account.tokens, "tokens_per_minute"), (account.requests, "requests_per_minute")):
            if bucket is not None and (wait_s := bucket.wait_s(now)):
                raise _over(key, limit, wait_s)
        if account.requests is not None:
            account.requests.take(1)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def spend(self, name: str, num_tokens: int) -> None:
        """Counts a request's tokens once it has ended; a running one is never cut short."""
        account = self._accounts.get(name)
        if account is not None and account.tokens is not None:
            account.tokens.take(num_tokens)

    def _reload(self) -> None:
        now = self._clock()
        if now - self._looked_s < RELOAD_INTERVAL_S:
            return
        self._looked_s = now
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            self._take(self._read())
        except SetupError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("read %d API keys again: %s", len(self._accounts), ", ".join(self._accounts))

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        """Keeps the accounts with unchanged limits."""
        before, now = self._accounts, self._clock()
        self._accounts = {}
        for key in keys:
            account = before.get(key.name)
            if account is None or replace(key, sha256=b"") != replace(account.key, sha256=b""):
                account = _Account(key, now)
            account.key = key
            self._accounts[key.name] = account

    def _stamp(self) -> tuple[int, int, int]:
        """Returns a value that changes with the file, also when a link leads to another one."""
        try:
            stat = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            return parse_keys(self._path.read_text(encoding="utf-8-sig"), str(self._path))
        except UnicodeDecodeError as error:
            raise SetupError(
                f"api_keys_file {self._path} is no text (byte {error.start}): lines as `moe-cluster keys new NAME` "
                "prints them are needed"
            ) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> SetupError:
        return SetupError(
            f"api_keys_file {self._path} cannot be read ({error.strerror}): it must be there wherever an ingress runs"
        )


def _parse_line(words: list[str], where: str) -> ApiKey:
    name, digest = words[0], words[1] if len(words) > 1 else ""
    limits: dict[str, int] = {}
    if not _NAME.fullmatch(name):
        raise SetupError(f"{where}: {shown(name)} is no name: at most 64 letters, digits, '-', '.' and '_' are needed")
    if not _SHA256.fullmatch(digest):
        raise SetupError(
            f"{where}: after {name!r} comes no SHA-256 of 64 hex digits: `moe-cluster keys new {name}` prints a line"
        )
    for word in words[2:]:
        limit, _, value = word.partition("=")
        number = int(value) if value.isascii() and value.isdigit() and len(value) <= MAX_LIMIT_DIGITS else 0
        if limit not in LIMITS or number < 1 or limit in limits:
            raise SetupError(
                f"{where}: {shown(word)} is no limit: one each of {', '.join(LIMITS)}, =N from 1, is allowed"
            )
        limits[limit] = number
    return ApiKey(name=name, sha256=bytes.fromhex(digest), **limits)


def _over(key: ApiKey, limit: str, wait_s: float) -> Overloaded:
    reason = f"key {key.name!r} has reached its limit, {limit}={getattr(key, limit)}"
    return Overloaded.later(reason, max(0.1, wait_s))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
