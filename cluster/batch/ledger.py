"""The file of answers: each line is written whole, once, also over several runs of which some were killed."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.batch.lines import Fault
from cluster.conversation import Json
from cluster.errors import SetupError


class Ledger:
    """Use it as a context manager: the file is locked meanwhile. done: ids of the lines that have their answer.

    Raises SetupError for a file that another batch writes to, that is no batch's, or that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        self.num_failed = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise SetupError(
                f"{path} cannot be written ({error.strerror}): choose another file for the answers"
            ) from error
        try:
            self._lock()
            self._take_up()
        except BaseException:
            os.close(self._file)
            raise

    def write(self, line_id: str, custom_id: str | None, answer: "Answer | Fault") -> None:
        """Raises OSError."""
        failed = isinstance(answer, Fault)
        line: dict[str, Json] = {
            "id": line_id,
            "custom_id": custom_id,
            "response": None if isinstance(answer, Fault) else answer,
            "error": {"code": answer.code, "message": answer.message} if isinstance(answer, Fault) else None,
        }
        raw = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        while raw:  # a disk that gets full takes a part first
            raw = raw[os.write(self._file, raw) :]
        self.done.add(line_id)
        self.num_failed += failed or (not isinstance(answer, Fault) and answer["status_code"] != 200)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(f"{self._path} is written by another batch: wait for it, or choose another file") from None

    def _take_up(self) -> None:
        """Reads the answers of earlier runs, and cuts a last line off that was written in part."""
        whole = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                if raw.strip():
                    self._take(raw, number)
        if whole != os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)

    def _take(self, raw: bytes, number: int) -> None:
        try:
            line = json.loads(raw)
            self.done.add(line["id"])
            response, _ = line["response"], line["custom_id"]
            self.num_failed += response is None or response["status_code"] != 200
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SetupError(f"{self._path}, line {number}, is no answer of a batch: choose another file") from None


Answer = Mapping[str, Json]  # status_code, request_id, body
