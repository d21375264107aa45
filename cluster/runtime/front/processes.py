"""Finds the processes in front of a served cluster: ingresses, and each node's HAProxy. Starts and ends none."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.names import APPLICATION, INGRESS

OF_A_RAY = b"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC="  # in the environment of all its processes; of each Ray another one
_TITLE = f"ray::ServeReplica:{APPLICATION}:{INGRESS}"
FIND_TIMEOUT_S = 60.0  # on all nodes; a process may have to start for it


def front_pids(known: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Role ("ingress" or "haproxy"), node and pid of each, on all nodes. Blocks.

    known: by node, the pid of any process of this Ray, if there is one.
    """
    here, found, elsewhere = ray.get_runtime_context().get_node_id(), [], {}
    find = ray.remote(num_cpus=0, max_retries=0)(_on_this_node)
    for node in (node["NodeID"] for node in ray.nodes() if node["Alive"]):
        if node == here and node in known:
            found += [(role, node, pid) for role, pid in _on_this_node(known[node])]
        else:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            elsewhere[node] = find.options(scheduling_strategy=where).remote(None)
    answers = ray.get([*elsewhere.values()], timeout=FIND_TIMEOUT_S)
    return found + [(role, node, pid) for node, pids in zip(elsewhere, answers, strict=True) for role, pid in pids]


def ready_ingresses() -> int:
    """Those that Serve has running: it has missed the dead ones only after a moment."""
    app = serve.status().applications.get(APPLICATION)
    if app is None or INGRESS not in app.deployments:
        return 0
    return int(app.deployments[INGRESS].replica_states.get("RUNNING", 0))


def _on_this_node(known: int | None) -> list[tuple[str, int]]:
    """known: the pid of a process of this Ray; None: this process is one."""
    found: list[tuple[str, int]] = []
    if not (mark := _mark(known or os.getpid())):
        return found
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):
            if (role := _role(pid)) and _mark(pid) == mark:
                found.append((role, pid))
    return found


def _mark(pid: int) -> bytes:
    """By which processes of one Ray know each other; b"" for one that is gone."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((word for word in words if word.startswith(OF_A_RAY)), b"")
    return b""


def _role(pid: int) -> str:
    if Path(f"/proc/{pid}/exe").readlink().name == "haproxy":
        return "haproxy"
    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    return "ingress" if title.startswith(_TITLE) else ""
