"""Prompts from arguments, files and standard input, for `generate`. Every fault is found before anything is sent."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster import inputs as checks
from cluster.cli.terminal import utf8
from cluster.conversation import Conversation, Json
from cluster.errors import InvalidRequest, SetupError

if TYPE_CHECKING:
    from cluster.types import SamplingParams

Format = Literal["lines", "jsonl", "whole"]
FORMATS: tuple[Format, ...] = ("lines", "jsonl", "whole")
INPUTS = ("prompt", "messages", "token_ids")
OTHERS = ("id", "tools")
MAX_TOKENS = 1 << 24  # the server knows the context
MAX_INPUT_BYTES = 256 << 20  # of one input, all of which is read before anything is sent


@dataclass(frozen=True, slots=True)
class Asked:
    """prompt: a text, a conversation or token ids.  given: what its line of output repeats."""

    prompt: "str | Conversation | list[int]"
    params: "SamplingParams"
    given: Mapping[str, Json] = field(default_factory=dict)


def read_prompts(
    prompts: Sequence[str], files: Sequence[Path], given_format: Format | None, params: "SamplingParams"
) -> list[Asked]:
    """Returns all prompts, those of the arguments first. Raises SetupError for an input that is none.

    files: "-" is standard input, which is read too where nothing else is given and no person types there.
    """
    found = [Asked(prompt, params, {"prompt": prompt}) for prompt in prompts]
    if not prompts and not files:
        if sys.stdin.isatty():
            raise SetupError("no prompt is given: give some, a --file, or a pipe with one a line")
        files = [Path("-")]
    for path in files:
        chosen = given_format or ("jsonl" if path.suffix in (".jsonl", ".ndjson") else "lines")
        found += _of_file(path, chosen, params)
    if not found:
        raise SetupError("the input has no prompt: every line is empty")
    return found


def _of_file(path: Path, chosen: Format, params: "SamplingParams") -> Iterator[Asked]:
    name = "standard input" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            raw = file.read(MAX_INPUT_BYTES + 1)
    except OSError as error:
        raise SetupError(f"{name} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_INPUT_BYTES:
        raise SetupError(f"{name} has more than {MAX_INPUT_BYTES} bytes: `moe-cluster batch` takes inputs of any size")
    text = utf8(raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), name)
    if chosen == "whole":
        if text.strip():
            yield Asked(text, params, {"prompt": text})
        return
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield (
                Asked(line, params, {"prompt": line})
                if chosen == "lines"
                else _of_object(line, f"line {number} of {name}", params)
            )


def _of_object(line: str, where: str, params: "SamplingParams") -> Asked:
    """A JSON object with a prompt, messages or token ids, and parameters of its own."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{where} is no JSON: {error}") from error
    inputs = [name for name in INPUTS if isinstance(given, dict) and name in given]
    if len(inputs) != 1:
        raise SetupError(f"{where} has {' and '.join(inputs) or 'no prompt'}: one of {', '.join(INPUTS)} is needed")
    chosen = {name: value for name, value in given.items() if name not in (*INPUTS, *OTHERS)}
    try:
        params.from_mapping(chosen)  # refuses unknown names
        prompt = _prompt(inputs[0], given)
        return Asked(
            prompt,
            replace(params, **chosen) if chosen else params,
            {name: given[name] for name in ("id", inputs[0]) if name in given},
        )
    except InvalidRequest as error:
        raise SetupError(f"{where}: {error}") from error


def _prompt(kind: str, given: Mapping[str, Json]) -> str | Conversation | list[int]:
    """Raises InvalidRequest."""
    value = given[kind]
    if kind == "messages":
        return Conversation(messages=value, tools=given.get("tools"))
    if kind == "prompt":
        return checks.text(value, "prompt")
    return list(checks.prompt_token_ids(value, "token_ids", MAX_TOKENS))
