"""docs/models.md: its tables are made from the code, and each cell of the parity table is a test."""

import re
import sys
import tomllib
from pathlib import Path

import models_docs
import pytest
from helm_charts import SHAPES

from cluster.checkpoint.made.published import PUBLISHED
from cluster.config.architectures.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
PAGE = models_docs.PAGE.read_text()
matrix = sys.modules["matrix"]


def rows(name):
    """The cells of a table's rows, by its mark."""
    [table] = re.findall(rf"<!-- {name}: [^\n]*\n(.*?)<!-- end -->", PAGE, flags=re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return lines[0], lines[2:]


def test_the_tables_are_up_to_date():
    """`python tests/models_docs.py` writes them."""
    assert models_docs.with_tables(PAGE) == PAGE


def test_every_family_and_every_released_model_is_on_the_page():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(ARCHITECTURES)
    assert [row[0] for row in rows("sizes")[1]] == list(PUBLISHED)
    assert "dense" in SHAPES


def test_each_cell_of_the_parity_table_is_a_test_and_each_test_a_cell():
    """The ids that pytest makes of the parameters, against those that the page's text names."""
    pytest.importorskip("ray")
    from test_parity_matrix import test_a_cell

    [parameters] = [mark for mark in test_a_cell.pytestmark if mark.name == "parametrize"]
    tests = [parameter.id for parameter in parameters.args[1]]
    marks = {mark.name for parameter in parameters.args[1] for mark in parameter.marks}
    assert marks <= {"ray", "slow"}, "no cell may be skipped or expected to fail"
    assert [mark.name for mark in test_a_cell.pytestmark] == ["parametrize"]
    header, lines = rows("parity")
    named = ["-".join((*row[:3], transport)) for row in lines for transport in header[3:]]
    assert sorted(named) == sorted(tests)
    assert len(tests) == len(set(tests))
    assert {row[0] for row in lines} == set(ARCHITECTURES) == set(matrix.FAMILIES)
    signs = {row[2]: set(row[3:]) for row in lines}
    assert signs == {"float32": {"="}, "bfloat16": {"≈"}, "float16": {"≈"}}


def test_both_suites_together_run_all_cells():
    """tests/parity/conftest.py fails a cell that is skipped while it runs."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert re.findall(r"-[mk]\b.*|--ignore.*|--deselect.*", options["addopts"]) == ["-m 'not slow'"]
    commands = re.findall(r"^(?:timeout .*)?(\bpytest\b.*)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert commands == ["pytest", "pytest -m slow"]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"tests/[\w/]+\.(?:py|md)", PAGE))))
def test_a_named_test_exists(path):
    assert (ROOT / path).exists()
