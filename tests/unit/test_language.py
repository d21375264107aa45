"""Names and sentences in plain English: what a tool can find of it. CONTRIBUTING.md has the rest."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for folder in ("cluster", "tests") for path in (ROOT / folder).rglob("*.py") if "pb" not in path.parts
)

VAGUE_NAMES = {"said", "told", "there", "own"}
# A sentence whose subject is a clause, such as "What a user reads." A question is none.
CLAUSE = re.compile(r"(?:^|[.!?:;)] +)((?:What|Whom|Whose|Who|Which) \w(?:[^.?!]|[.?!](?=\w))*(?:[.!]|$))")


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that the code binds: variables, attributes, parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def texts(code: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings, and of the comments, of which those of successive lines are one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring
    start, last, lines = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if lines and (line != last + 1 or token.line[: token.start[1]].strip()):
            yield start, " ".join(lines)
            lines = []
        start, last = line if not lines else start, line
        lines.append(token.string.lstrip("#: "))
    if lines:
        yield start, " ".join(lines)


def faults(code: str) -> list[str]:
    tree = ast.parse(code)
    found = [(line, f"a variable is named `{name}`") for line, name in names(tree) if name.strip("_") in VAGUE_NAMES]
    for line, text in texts(code, tree):
        for paragraph in re.split(r"\n\s*\n", text):
            found += [
                (line, f"a clause is the subject: {match[1]}") for match in CLAUSE.finditer(" ".join(paragraph.split()))
            ]
    return [f"{line}: {fault}" for line, fault in sorted(found)]


def test_no_name_is_vague_and_no_sentence_begins_with_a_clause():
    assert len(FILES) > 300
    found = [f"{path.relative_to(ROOT)}:{fault}" for path in FILES for fault in faults(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "said = 1",
        "for told in (): pass",
        "def f(there): pass",
        "def f(*, own=1): pass",
        "class A:\n    told: int",
        "def f(self):\n    self._own = 1",
        "try: pass\nexcept OSError as said: pass",
        "with f() as (a, there): pass",
        '"""What a user reads."""',
        'def f():\n    """Whom it calls\n    next."""',
        'def f():\n    """Returns it. Who asks\n    again, gets it twice."""',
        "a = 1  # Which shards are up",
        "# What Serve (2.60) reads.",
        "# It stays.\n# What goes, goes.",
        "# Who calls\n# whom. Why?",
    ],
)
def test_a_vague_name_or_a_clause_is_found(code):
    assert len(faults(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "said_by = owned = 1",
        "f(own=1)",
        'question = "What is a cat"',
        '"""Which of them is up?"""',
        '"""Whether it is up, and what follows."""',
        "# Why: who knows.",
        'def f():\n    """Who is up? Ray knows."""',
    ],
)
def test_other_names_and_questions_pass(code):
    assert faults(code) == []
