"""Starts a worker of a Ray of ours, in place of Ray's own script of this name, which loads Ray to do so.

Ray (2.60) runs it by its path before each worker, as `setup_worker.py [python's flags] WORKER ARGUMENTS… --language=…
--serialized-runtime-env-context=…`: half a second of CPU for a process that then becomes another one. Imports nothing
but small modules. Gives up for Ray's own where a context asks for more than variables of the environment.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

CONTEXT, PYTHON = "--serialized-runtime-env-context=", "--language=PYTHON"
LESS: dict[str, object] = {"command_prefix": [], "override_worker_entrypoint": None, "java_jars": []}  # nothing to do


def plan(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]] | None:
    """The variables and the command of a worker; None where Ray's own script has to start it."""
    contexts = [one.removeprefix(CONTEXT) for one in arguments if one.startswith(CONTEXT)]
    if len(contexts) != 1 or PYTHON not in arguments:
        return None
    context = json.loads(contexts[0])
    variables, python = context.pop("env_vars", {}), context.pop("py_executable", sys.executable)
    if python != sys.executable or any(LESS.get(name, value) != value for name, value in context.items()):
        return None
    if context.keys() - LESS.keys() or any("$" in value for value in variables.values()):  # Ray would expand them
        return None
    return variables, [python, *(one for one in arguments if one != PYTHON and not one.startswith(CONTEXT))]


def main() -> None:
    planned = plan(sys.argv[1:])
    if planned is not None:
        variables, command = planned
        os.environ.update(variables)
        os.execv(command[0], command)
    ray = find_spec("ray")  # not loaded by that
    assert ray is not None
    assert ray.origin is not None
    theirs = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, theirs, *sys.argv[1:]])


if __name__ == "__main__":
    main()
