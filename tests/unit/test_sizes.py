"""How large a file, a function and a list of parameters may be, so that a reader can hold each in the head."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / "cluster").rglob("*.py")) if "pb" not in path.parts]

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 5  # that are not keyword-only; `self` and `cls` do not count

# The exceptions, each with the size that it may have. These lists only shrink: a line that is no longer needed makes
# its test fail.
LARGE_FILES: dict[str, int] = {}
LARGE_FUNCTIONS: dict[str, int] = {}
LONG_PARAMETER_LISTS: dict[str, int] = {}


def functions():
    """(name, node) of each function and method; a name is `path:function`."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def num_lines(function):
    """With its docstring, without its decorators."""
    return function.end_lineno - function.lineno + 1


def is_kernel(function):
    """Triton's get all of their arguments in one launch."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def num_parameters(function):
    parameters = [*function.args.posonlyargs, *function.args.args]
    return sum(parameter.arg not in ("self", "cls") for parameter in parameters)


def above(limit, sizes):
    """The sizes above the limit by name; the largest where several functions of a file have one name."""
    found = {}
    for name, size in sizes:
        if size > limit:
            found[name] = max(size, found.get(name, 0))
    return found


def check(limit, sizes, exceptions):
    found = above(limit, sizes)
    assert {name: size for name, size in found.items() if size > exceptions.get(name, limit)} == {}, "too large"
    assert sorted(exceptions.keys() - found) == [], "no longer needed as an exception"


def test_no_file_is_longer_than_a_reader_can_hold():
    sizes = ((str(path.relative_to(ROOT)), len(path.read_text().splitlines())) for path in FILES)
    check(MAX_FILE_LINES, sizes, LARGE_FILES)


def test_no_function_is_longer_than_a_reader_can_hold():
    sizes = ((name, num_lines(function)) for name, function in functions())
    check(MAX_FUNCTION_LINES, sizes, LARGE_FUNCTIONS)


def test_no_function_takes_more_parameters_by_place_than_a_caller_can_hold():
    sizes = ((name, num_parameters(function)) for name, function in functions() if not is_kernel(function))
    check(MAX_PARAMETERS, sizes, LONG_PARAMETER_LISTS)


def test_sizes_are_counted_as_they_are_meant():
    """Four lines from `def` on; a, b and c by place."""
    source = """
@decorated
def f(self, a, b, /, c, *d, e, **g):
    '''One
    docstring.'''
    return a
"""
    [function] = ast.parse(source).body
    assert (num_lines(function), num_parameters(function)) == (4, 3)
    assert above(50, [("f", 51), ("f", 60), ("f", 55), ("g", 50)]) == {"f": 60}
