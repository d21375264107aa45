"""Reads a trace of requests: when they came, how long their prompts and answers were."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from cluster.errors import SetupError
from cluster.planning.load import TraceLoad

MAX_REQUESTS = 10_000_000
MAX_TOKENS = 1 << 24
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
    begin = arrivals[0][0]
    return TraceLoad([(at - begin, prompt_tokens, output_tokens) for at, prompt_tokens, output_tokens in arrivals])


def _arrival(line: str, where: str) -> tuple[float, int, int]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{where} is no JSON: {error}") from None
    if isinstance(raw, dict):
        for at, prompt, output, scale in FIELDS:
            if at in raw:
                return scale * _number(raw, at, where), _count(raw, prompt, where), _count(raw, output, where)
    ours = ", ".join(str(name) for name in FIELDS[0][:3])
    raise SetupError(f"{where} lacks its arrival: {ours} are needed, or timestamp, input_length, output_length")


def _number(raw: Mapping[str, Any], name: str, where: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise SetupError(f"{where}: {name} is {str(value)[:40]}, a number is needed")
    return float(value)


def _count(raw: Mapping[str, Any], name: str, where: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise SetupError(f"{where}: {name} is {str(value)[:40]}, a whole number from 1 to {MAX_TOKENS:,} is needed")
    return value
