"""The commands and examples that the documents have.

A block without a fence, four spaces deep, has commands; a line that begins with a brace is one of a file of JSON lines.
A fence names its language; text is an output or a drawing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "yaml", "json", "ini", "text", "shell", "javascript")
PAGES = (
    "README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "SECURITY.md", "ARCHITECTURE.md", "deploy/demo/README.md",
    "helm/moe-cluster/README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md"))),
)  # fmt: skip
PROGRAMS = re.compile(
    r"^\s*(?:[A-Z_]+=\S+ )*(moe-cluster|curl|pip|python3?|helm|kubectl|ray|serve|docker|buf|npm)\s", re.MULTILINE
)


@dataclass(frozen=True)
class Example:
    """One command, or one example in a language. line: where it begins. A command is one line, without comments."""

    page: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: str, text: str | None = None) -> list[Example]:
    """All of a page, in its order. text: in place of the page's own."""
    lines = ((ROOT / page).read_text() if text is None else text).splitlines()
    found: list[Example] = []
    number = 0
    while number < len(lines):
        begin, line = number, lines[number]
        if line.startswith("```"):
            number += 1
            while not lines[number].startswith("```"):
                number += 1
            found.append(Example(page, begin + 1, line[3:].strip(), "\n".join(lines[begin + 1 : number])))
        elif line.startswith("::: "):  # mkdocstrings: its options follow
            while number + 1 < len(lines) and (not lines[number + 1] or lines[number + 1].startswith("    ")):
                number += 1
        elif line.startswith("    "):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            found += _of_block(page, begin + 1, [each[4:] for each in lines[begin : number + 1]])
        number += 1
    return found


def _of_block(page: str, first: int, lines: list[str]) -> list[Example]:
    """The commands of an indented block; one goes on while a quote is open, or behind a backslash."""
    found: list[Example] = []
    command, begin = "", first
    for number, line in enumerate(lines, first):
        command, begin = (f"{command}{line}", begin) if command else (line, number)
        command = _without_comment(command)
        if command.endswith("\\"):
            command = f"{command[:-1].rstrip()} "
        elif _quote_is_open(command):
            command += "\n"
        else:
            language = "json" if re.fullmatch(r"\{.*\}", command) else ""
            found += [Example(page, begin, language, part) for part in _parts(command)]
            command = ""
    assert not command, f"{page}:{begin}: a command without an end"
    return found


def _quote_is_open(text: str) -> bool:
    """Whether a quotation begins in the text and does not end there."""
    return len(re.sub(r"""'[^']*'|"[^"]*\"""", "", text).replace('"', "'").split("'")) % 2 == 0


def _without_comment(command: str) -> str:
    begins = [found.start() for found in re.finditer(r"\s+# ", command) if not _quote_is_open(command[: found.start()])]
    return command[: min(begins, default=len(command))].rstrip()


def _parts(command: str) -> list[str]:
    """The commands that `&&` joins."""
    first, joined, rest = command.partition(" && ")
    return [first.strip(), *_parts(rest)] if joined and not _quote_is_open(first) else [command.strip()]


def json_lines(page: str) -> list[str]:
    """The lines of JSON that are whole, without an ellipsis."""
    lines = [one.text for one in examples(page) if one.language == "json" and "…" not in one.text]
    for line in lines:
        json.loads(line)
    return lines
