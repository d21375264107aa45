"""A test file runs alone, and beside any other: it names the modules of its fixtures, and the shared Ray."""

import ast
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

TEST_FILES = list(Path(__file__).parents[1].rglob("test_*.py"))
OF_THE_SHARED_RAY = {"ray_cluster", "application", "served", "served_for_good", "channel"}  # in conftest.py


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def named(path: Path) -> set[str]:
    """The modules of a file's `pytest_plugins`."""
    if "pytest_plugins" not in path.read_text():
        return set()  # to parse all files takes seconds of each process that collects tests
    assigned = [node for node in parsed(path).body if isinstance(node, ast.Assign)]
    found = [node.value for node in assigned if ast.unparse(node.targets[0]) == "pytest_plugins"]
    return {name for value in found for name in ast.literal_eval(value)}


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)}


def fixtures(path: Path) -> set[str]:
    return {
        name for name, node in functions(path).items() if any("fixture" in ast.unparse(d) for d in node.decorator_list)
    }


def taken(path: Path) -> set[str]:
    """The arguments of a file's tests and fixtures that neither the file nor a parameter gives."""
    found = set()
    for name, node in functions(path).items():
        if name.startswith("test_") or name in fixtures(path):
            given = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            found |= {arg.arg for arg in node.args.args if arg.arg not in given}
    return found - functions(path).keys()


@pytest.mark.parametrize("module", sorted({name for path in TEST_FILES for name in named(path)}))
def test_each_file_names_the_module_of_its_fixtures(module: str) -> None:
    shared = fixtures(Path(__file__).parent / f"{module}.py")
    users = [path for path in TEST_FILES if path.parent == Path(__file__).parent and taken(path) & shared]
    assert len(users) > 1
    assert sorted(path.name for path in users if module not in named(path)) == []


def test_each_file_that_shares_the_ray_has_its_mark() -> None:
    """Without it, two processes would start a Ray each."""
    pytest.importorskip("xdist")
    from two_processes import shares_ray

    users = [path for path in TEST_FILES if taken(path) & OF_THE_SHARED_RAY]
    assert len(users) > 10
    assert sorted(path.name for path in users if not shares_ray(path)) == []


def test_files_that_share_the_ray_are_first_then_those_of_long_timeouts_and_of_most_tests() -> None:
    pytest.importorskip("xdist")
    from two_processes import pytest_collection_modifyitems as put_in_order
    from two_processes import shares_ray

    shared = sorted(path for path in TEST_FILES if shares_ray(path))[:2]
    long, many, few = sorted(path for path in TEST_FILES if not shares_ray(path))[:3]
    places = [few, shared[1], many, long, many, shared[0], shared[1]]
    marks = {long: SimpleNamespace(args=(900,))}

    def item(path: Path) -> SimpleNamespace:
        return SimpleNamespace(path=path, get_closest_marker=lambda name: marks.get(path))

    items = [item(path) for path in places]
    put_in_order(items)
    assert [item.path for item in items] == [shared[1], shared[0], shared[1], long, many, many, few]
