"""SECURITY.md names a test for each of its lines; each of them exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"(tests/[\w/]+\.py)::(\w+)", TEXT)


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 20
    assert [(path, name) for path, name in NAMED if f"def {name}(" not in (ROOT / path).read_text()] == []


def test_every_line_of_the_tables_names_a_test():
    rows = [
        line
        for line in TEXT.splitlines()
        if line.startswith("|") and not line.startswith(("| ---", "| port", "| limit"))
    ]
    assert len(rows) > 15
    assert [row for row in rows if not re.search(r"tests/[\w/]+\.py::\w+ \|$", row)] == []
