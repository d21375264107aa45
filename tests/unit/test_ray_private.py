"""Ray's private names are imported in one room only: when Ray changes one, there is one place to look."""

import ast
import os
import select
import subprocess
from pathlib import Path
from types import SimpleNamespace

from cluster.runtime.ray_private import core
from cluster.runtime.ray_private.core import reports_to_log, worker

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "cluster" / "runtime" / "ray_private"
HANDLE = {"_actor_id"}  # private attributes of Ray's objects that no import shows


def dotted(node):
    """`a.b.c` of an attribute chain; "" of anything else."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name):
    first, *rest = name.split(".")
    return first in ("ray", "serve") and any(part.startswith("_") and not part.startswith("__") for part in rest)


def private_names(source):
    """The private names of Ray that a file's source uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom):
            yield from (name for alias in node.names if is_private(name := f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Attribute) and (is_private(name := dotted(node)) or node.attr in HANDLE):
            yield name or node.attr


def test_private_names_are_found():
    source = """
import ray, ray._raylet
from ray._private import services
from ray.serve._private.constants import X
from ray.serve.context import _get_client
from ray import serve
ray.get(handle)._actor_id
ray._private.worker.node
ray.__version__, ray.util.x, self._private
"""
    assert set(private_names(source)) == {
        "ray._raylet",
        "ray._private.services",
        "ray.serve._private.constants.X",
        "ray.serve.context._get_client",
        "_actor_id",
        "ray._private",
        "ray._private.worker",
        "ray._private.worker.node",
    }


def test_only_one_room_uses_private_names_of_ray():
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        if path.parent != ROOM:
            assert list(private_names(path.read_text())) == [], path


def test_what_rays_processes_report_goes_to_the_log_until_it_is_undone(capsys, caplog):
    """As of a raylet that starts more workers than it likes: Ray would print this on standard output, in yellow."""
    report = {"lines": ["WARNING: 8 PYTHON worker processes have been started"], "pid": "raylet", "is_err": False}
    undo = reports_to_log()
    with caplog.at_level("INFO"):
        worker.print_to_stdstream(report, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    assert "Ray: WARNING: 8 PYTHON worker" in caplog.text
    undo()
    worker.print_to_stdstream(report, ignore_prefix=False)
    assert "(raylet)" in capsys.readouterr().out


class Node:
    """Ray's, of a raylet with a child. `ray.shutdown` kills its processes, and so does the end of this process."""

    def __init__(self):
        self.raylet = subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; exec sleep 300"], stdout=subprocess.PIPE)
        self.child, self.hows = int(self.raylet.stdout.readline()), []
        self.all_processes = {"raylet": [SimpleNamespace(process=self.raylet)]}

    def kill_all_processes(self, **how):
        self.hows.append(how)
        self.raylet.kill()
        self.raylet.wait()


def test_a_raylets_children_end_with_it_and_its_pid_is_not_looked_at_later(monkeypatch):
    node, looked_at, children = Node(), [], core._children
    monkeypatch.setattr(core.worker, "_global_node", node)
    monkeypatch.setattr(core, "_children", lambda pid: looked_at.append(pid) or children(pid))
    monkeypatch.setattr(core.ray, "shutdown", lambda: node.kill_all_processes(check_alive=False, allow_graceful=True))
    handle = os.pidfd_open(node.child)
    core.end_started()
    assert select.select([handle], [], [], 30.0)[0]  # it has ended
    os.close(handle)
    node.kill_all_processes(check_alive=False, allow_graceful=True)
    assert looked_at == [node.raylet.pid]
    assert node.hows == [{"check_alive": False, "allow_graceful": False}] * 2
