"""Reads a batch's requests: a JSON object a line, as the OpenAI API describes them. Knows no answers.

A line's id depends on its bytes, and on how many equal lines stand before it: lines that are moved keep their answers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.conversation import Json
from cluster.errors import SetupError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINE_BYTES = 64 << 20
MAX_CUSTOM_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line is no request. code: as in the OpenAI API, where it has one."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line. fault: None for a request, whose url and body are set.  custom_id: None where none can be read.
    offset, length: its bytes in the file."""

    id: str
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Json] | None = None
    fault: Fault | None = None
    offset: int = 0
    length: int = 0


def read(path: Path) -> Iterator[Line]:
    """Yields every line that is not empty. Raises SetupError, OSError."""
    seen: Counter[bytes] = Counter()
    custom_ids: set[str] = set()
    with path.open("rb") as file:
        for number, offset, length, raw, digest in _raw_lines(file):
            seen[digest] += 1
            times = f"-{seen[digest]}" if seen[digest] > 1 else ""
            line_id = f"batch_req_{digest.hex()}{times}"
            line = _too_long(line_id) if raw is None else parse(raw, line_id)
            if line.custom_id is not None and line.fault is None and line.custom_id in custom_ids:
                fault = Fault("duplicate_custom_id", f"custom_id {line.custom_id!r} is that of an earlier line")
                line = Line(line_id, line.custom_id, fault=fault)
            if line.custom_id is not None:
                custom_ids.add(line.custom_id)
            yield _placed(line, number, offset, length)


def count(path: Path) -> int:
    """The number of lines that are not empty. Raises SetupError."""
    try:
        if path.exists() and not path.is_file():
            raise SetupError(f"{path} is no file that can be read more than once: save its lines in one")
        with path.open("rb") as file:
            return sum(1 for _ in _raw_lines(file))
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from error


def parse(raw: bytes, line_id: str) -> Line:
    """The request of one line, or its fault."""
    try:
        given = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _faulty(line_id, None, "invalid_json_line", f"it is not valid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return _faulty(line_id, None, "invalid_json_line", f"it is no JSON: {error}")
    if not isinstance(given, dict):
        return _faulty(line_id, None, "invalid_json_line", "it is no JSON object")
    custom_id = given.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id is needed, a text of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        return _faulty(line_id, None, "missing_required_parameter", message)
    url, body = given.get("url"), given.get("body")
    if given.get("method") != "POST":
        return _faulty(line_id, custom_id, "invalid_method", "method is POST for every request")
    if url not in URLS:
        return _faulty(line_id, custom_id, "invalid_url", f"url is needed, one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        return _faulty(line_id, custom_id, "missing_required_parameter", "body is needed, a JSON object")
    if body.get("stream"):
        return _faulty(line_id, custom_id, "invalid_request", "stream is not for batches: leave it out of the body")
    return Line(line_id, custom_id, url, body)


def _faulty(line_id: str, custom_id: str | None, code: str, message: str) -> Line:
    return Line(line_id, custom_id, fault=Fault(code, message))


def _too_long(line_id: str) -> Line:
    return _faulty(line_id, None, "invalid_json_line", f"it has more than {MAX_LINE_BYTES >> 20} MiB")


def _placed(line: Line, number: int, offset: int, length: int) -> Line:
    fault = line.fault and Fault(line.fault.code, f"line {number}: {line.fault.message}")
    return Line(line.id, line.custom_id, line.url, line.body, fault, offset, length)


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, int, int, bytes | None, bytes]]:
    """Number, offset, length, bytes and digest of every line that is not empty; bytes are None of one too long."""
    number = offset = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        begin, digest, too_long = offset, hashlib.sha256(raw.strip()), False
        offset += len(raw)
        while not raw.endswith(b"\n") and len(raw) > MAX_LINE_BYTES:
            too_long = True
            raw = file.readline(MAX_LINE_BYTES + 1)
            digest.update(raw)
            offset += len(raw)
        if too_long:
            yield number, begin, offset - begin, None, digest.digest()[:12]
        elif raw.strip():
            yield number, begin, offset - begin, raw.strip(), digest.digest()[:12]
