"""Our script that starts a Ray's workers does what Ray's own does, and leaves to it what it does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.runtime.ray_private.core import ray_constants
from cluster.runtime.start import setup_worker
from cluster.runtime.start.ray_start import quick_workers

THEIRS = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"
OURS = setup_worker.__file__
WORKER = "import json, os, sys; print(json.dumps([sys.argv[1:], sys.flags.no_site, os.environ.get('A'), os.getpid()]))"


def arguments(context, *, language="PYTHON"):
    return [f"--serialized-runtime-env-context={json.dumps(context)}", f"--language={language}"]


def context(**parts):
    return {
        "command_prefix": [],
        "env_vars": {},
        "py_executable": sys.executable,
        "override_worker_entrypoint": None,
        "java_jars": [],
        **parts,
    }


@pytest.mark.parametrize("variables", [{}, {"A": 'it\'s "quoted" twice', "B": ""}, {"A": "${HOME}/x"}])
def test_a_worker_starts_as_rays_own_script_starts_it(tmp_path, variables):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = ["-S", str(worker), "--address=1 2", *arguments(context(env_vars=variables)), "--token=$HOME 'a'"]
    results = []
    for script in (THEIRS, OURS):
        with subprocess.Popen([sys.executable, script, *command], stdout=subprocess.PIPE, text=True) as process:
            *result, pid = json.loads(process.communicate(timeout=60)[0])
        assert pid == process.pid  # Ray waits for this one
        results.append(result)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "others",
    [
        arguments(context(command_prefix=["conda", "run"])),
        arguments(context(py_executable="py-spy record -- python")),
        arguments(context(override_worker_entrypoint="/w.py")),
        arguments(context(env_vars={"PATH": "/bin:${PATH}"})),
        arguments(context(new_in_a_later_ray=1)),
        arguments(context(), language="JAVA"),
        arguments(context())[1:],
    ],
)
def test_another_worker_is_left_to_rays_own(others):
    assert setup_worker.plan(["worker.py", *others]) is None


def test_it_loads_nothing_that_takes_time():
    program = f"import runpy, sys; runpy.run_path({OURS!r}); sys.exit('ray' in sys.modules or 'cluster' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", program], timeout=60).returncode == 0


def test_ray_finds_it_by_its_absolute_path_for_as_long_as_a_ray_starts():
    before = ray_constants.SETUP_WORKER_FILENAME
    with quick_workers():
        assert os.path.join("/ray/workers", ray_constants.SETUP_WORKER_FILENAME) == OURS
    assert ray_constants.SETUP_WORKER_FILENAME == before == Path(OURS).name  # the raylet looks for this name
