"""No module needs, by whatever way, a module that needs it: each can be read, and tested, after those below it."""

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


def order(imports):
    """The modules, each after those that it imports (`imports`, by module). Raises CycleError."""
    return list(TopologicalSorter(imports).static_order())


def test_no_modules_import_each_other_in_a_circle():
    """Also not inside a function or for annotations alone: grimp counts those imports too."""
    graph = grimp.build_graph("cluster")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    try:
        order(imports)
    except CycleError as error:
        pytest.fail("imports in a circle: " + " imports ".join(reversed(error.args[1])))


def test_a_circle_is_found():
    with pytest.raises(CycleError) as raised:
        order({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert set(raised.value.args[1]) == {"b", "c"}
