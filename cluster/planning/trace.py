"""Reads a trace of requests: when they came, how long their prompts and answers were."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest, SetupError
from cluster.inputs import is_whole_number, number, shown
from cluster.planning.load import TraceLoad

MAX_REQUESTS = 10_000_000
MAX_TOKENS = 1 << 24
MAX_MOMENT = 1e13  # milliseconds since 1970, and three hundred years more
MAX_S = 366 * 86400.0  # from the first request to the last
# Ours, and those of Mooncake's published traces, whose timestamps are milliseconds.
FIELDS = (("arrival_s", "prompt_tokens", "output_tokens", 1.0), ("timestamp", "input_length", "output_length", 0.001))


def read_trace(path: Path) -> TraceLoad:
    """A JSON object a line. Raises SetupError, which names the line."""
    arrivals: list[tuple[float, int, int]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    arrivals.append(_arrival(line, f"--trace {path}, line {number}"))
                if len(arrivals) > MAX_REQUESTS:
                    raise SetupError(f"--trace {path} has over {MAX_REQUESTS:,} requests: give a part of it")
    except OSError as error:
        raise SetupError(f"--trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SetupError(f"--trace {path} is no text (byte {error.start})") from None
    if not arrivals:
        raise SetupError(f"--trace {path} has no request: a JSON object a line is needed")
    arrivals.sort(key=lambda arrival: arrival[0])
    begin, end = arrivals[0][0], arrivals[-1][0]
    if end - begin > MAX_S:
        raise SetupError(f"--trace {path} is {(end - begin) / 86400:,.0f} days long, at most 366 are replayed")
    return TraceLoad([(at - begin, prompt_tokens, output_tokens) for at, prompt_tokens, output_tokens in arrivals])


def _arrival(line: str, where: str) -> tuple[float, int, int]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{where} is no JSON: {error}") from None
    if isinstance(raw, dict):
        for at, prompt, output, scale in FIELDS:
            if at in raw:
                return scale * _moment(raw, at, where), _count(raw, prompt, where), _count(raw, output, where)
    ours = ", ".join(str(name) for name in FIELDS[0][:3])
    raise SetupError(f"{where} lacks its arrival: {ours} are needed, or timestamp, input_length, output_length")


def _moment(raw: Mapping[str, Any], name: str, where: str) -> float:
    try:
        found = number(raw.get(name), name)
    except InvalidRequest as error:
        raise SetupError(f"{where}: {error}") from None
    if not 0 <= found <= MAX_MOMENT:
        raise SetupError(f"{where}: {name} is {shown(raw[name])}, 0 to {MAX_MOMENT:g} is possible")
    return found


def _count(raw: Mapping[str, Any], name: str, where: str) -> int:
    value: Any = raw.get(name)
    if not is_whole_number(value) or not 1 <= value <= MAX_TOKENS:
        raise SetupError(f"{where}: {name} is {shown(value)}, a whole number from 1 to {MAX_TOKENS:,} is needed")
    return int(value)
