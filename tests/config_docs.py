"""docs/configuration.md's table and the comments of deploy/serve*.yaml, from the help texts of `ClusterConfig`.

`python tests/config_docs.py` writes them. In these files the lines above an argument are its help text; the
comments behind values, the values, their order and the groups are written by hand.
"""

import json
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

import yaml

from cluster.config import ClusterConfig, EngineConfig
from cluster.config.options import doc_of

ROOT = Path(__file__).resolve().parents[1]
PAGE, SERVE_FILES = ROOT / "docs" / "configuration.md", sorted((ROOT / "deploy").glob("serve*.yaml"))
BEGIN, END = "<!-- arguments: made by tests/config_docs.py -->\n", "<!-- end of arguments -->\n"
FIELDS = {field.name: field for field in fields(ClusterConfig)}
LINE_CHARS = 120


def default(field):
    return "required" if field.default is MISSING else "`" + repr(field.default).replace("'", '"') + "`"


def in_yaml(field):
    return "null" if field.default is None else json.dumps(field.default).strip('"')


def table():
    """Markdown of all arguments, the engine's last."""
    engine = {field.name for field in fields(EngineConfig)}
    ordered = sorted(FIELDS.values(), key=lambda field: field.name in engine)
    lines = ["| argument | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{field.name}` | {default(field)} | {doc_of(field)} |" for field in ordered]
    return "\n".join(lines) + "\n"


def with_table(page):
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def with_comments(text):
    """A file for `serve deploy` with each argument's help text above it."""
    before, args = text.split("    args:\n")
    lines = []
    for line in args.splitlines():
        found = re.match(r"      (\w+):", line)
        if found is not None:
            field, [value] = FIELDS[found[1]], yaml.safe_load(line).values()
            differs = field.default is not MISSING and value != field.default
            meaning = doc_of(field) + (f" (default: {in_yaml(field)})" if differs else "")
            prefix = "      # "
            lines += textwrap.wrap(meaning, LINE_CHARS, initial_indent=prefix, subsequent_indent=prefix)
        if not line.startswith("      #"):
            lines.append(line)
    return before + "    args:\n" + "\n".join(lines) + "\n"


def main():
    PAGE.write_text(with_table(PAGE.read_text()))
    for path in SERVE_FILES:
        path.write_text(with_comments(path.read_text()))


if __name__ == "__main__":
    main()
