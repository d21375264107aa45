"""`moe-cluster doctor`, on machines and installations that lack something, and the line that names the kernels."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from cluster import doctor
from cluster.cli import main
from cluster.kernels.native.library import LIBRARY_VARIABLE, VARIABLE, variants

CPUINFO = """\
processor	: 0
model name	: Some Processor 7
flags		: fpu sse2 avx2 fma avx512_bf16

processor	: 1
model name	: Some Processor 7
flags		: fpu sse2 avx2 fma avx512_bf16
"""


def findings(subject, root=doctor.ROOT):
    return [finding for finding in doctor.examine(root) if finding.subject == subject]


@pytest.fixture
def machine(tmp_path):
    """A machine's folders: 3 GB of 8 free, both disks there."""
    for folder in ("proc", "tmp", "dev/shm"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 3000000 kB\n")
    return tmp_path


@pytest.fixture
def requires(monkeypatch):
    """Sets what this package requires."""

    def set_to(*requirements):
        monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))

    return set_to


def test_what_this_installation_has_is_enough(capsys):
    """These tests run in it."""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "this machine can serve" in out
    for subject in (
        "Python",
        "moe-cluster",
        "Ray",
        "torch",
        "ranks",
        "GPU",
        "CPU",
        "kernels",
        "memory",
        "/tmp",
        "/dev/shm",
    ):
        assert f" {subject} " in out


def test_json_has_the_same_findings(capsys):
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_serve"] is True
    subjects = [finding["subject"] for finding in answer["findings"]]
    assert subjects == [finding.subject for finding in doctor.examine()]
    assert set(answer["findings"][0]) == {"subject", "found", "advice", "missing"}


def test_a_machine_is_described_by_its_files(machine):
    [cpu] = findings("CPU", machine)
    assert cpu.found.startswith("Some Processor 7, ")
    assert cpu.found.endswith("; avx2 avx512_bf16")
    [memory] = findings("memory", machine)
    assert (memory.found, memory.advice) == ("3.1 of 8.2 GB free", "")  # kB of 1024 bytes


def test_little_memory_and_a_missing_disk_are_said_with_what_to_do(machine):
    (machine / "proc/meminfo").write_text("MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n")
    (machine / "dev/shm").rmdir()
    [memory], [shm] = findings("memory", machine), findings("/dev/shm", machine)
    assert (memory.advice, memory.missing) == ("2.1 GB are needed beside the weights", False)
    assert (shm.found, shm.missing) == ("No such file or directory", True)


def test_a_full_disk_is_said(machine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    [disk] = findings("/tmp", machine)
    assert (disk.found, disk.advice) == ("0.0 GB free", "1.1 GB are needed: sockets and Ray's logs lie there")


def test_packages_of_another_version_or_missing_are_named_with_the_command_to_mend_them(requires, capsys):
    requires("numpy<1", "no-such-package>=3", "pytest>=1", "also-missing; extra == 'test'")
    assert "1 of 3 packages as required" in findings("moe-cluster")[0].found
    [numpy], [missing] = findings("numpy"), findings("no-such-package")
    assert numpy.found == f"{metadata.version('numpy')}, <1 is required"
    assert (numpy.advice, numpy.missing) == ("pip install 'numpy<1'", False)
    assert (missing.found, missing.missing) == ("not installed", True)
    assert findings("also-missing") == []
    assert main(["doctor"]) == 1
    assert "1 missing: nothing can be served" in capsys.readouterr().out


def test_another_python_is_not_enough(monkeypatch):
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.99,<4"})
    [python] = findings("Python")
    assert (python.advice, python.missing) == ("install moe-cluster with a Python >=3.99,<4", True)


def run(code, **environment):
    surroundings = {name: value for name, value in os.environ.items() if name not in (VARIABLE, LIBRARY_VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", code], env=surroundings | environment, capture_output=True, text=True, timeout=120
    )


def test_without_torch_and_ray_it_says_so():
    code = (
        "import sys\nfor name in ('torch', 'ray'): sys.modules[name] = None\n"
        "from cluster.cli import main\nsys.exit(main(['doctor', '--json']))"
    )
    done = run(code)
    assert done.returncode == 1, done.stderr
    [torch] = [finding for finding in json.loads(done.stdout)["findings"] if finding["subject"] == "torch"]
    assert (torch["advice"], torch["missing"]) == ("install torch again", True)


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from cluster.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize(
    "package",
    [
        "grpc",
        "rich",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tokenizers", "packaging", "jinja2", "google")),
    ],
)
def test_it_runs_whatever_package_is_missing(package):
    done = run(BLOCKED.format(package=package, arguments=["doctor"]))
    assert (done.stderr, "Python" in done.stdout) == ("", True)
    if package in ("grpc", "tokenizers", "google"):  # the other commands import these when they are listed
        assert (done.returncode, f"No module named '{package}" in done.stdout.replace("\n", " ")) == (1, True)


def test_another_command_names_what_is_missing():
    done = run(BLOCKED.format(package="grpc", arguments=["plan", "/nowhere"]))
    expected = "moe-cluster: No module named 'grpc': `moe-cluster doctor` shows what this installation lacks\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_a_package_that_breaks_while_it_is_imported_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("half of it is here")

    monkeypatch.setattr(doctor, "import_module", broken)
    [ray] = findings("ray")
    assert (ray.found, ray.missing) == ("cannot be imported: RuntimeError: half of it is here", True)


LOG = (
    "import logging; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
    "from cluster.kernels.native.report import log_kernels\nlog_kernels(); log_kernels()"
)


FIRST, *OTHERS = variants() or [""]


@pytest.mark.skipif(not variants(), reason="the native kernels are not built")
@pytest.mark.parametrize("variant", [FIRST, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_a_process_names_its_kernels_once(variant):
    assert run(LOG, **{VARIABLE: variant}).stderr == f"INFO kernels: native {variant}\n"


def test_a_process_says_why_torch_computes():
    off, missing = run(LOG, **{VARIABLE: "off"}), run(LOG, **{LIBRARY_VARIABLE: "/nowhere/library.so"})
    assert off.stderr == f"INFO kernels: torch's alone, by {VARIABLE}=off\n"
    assert missing.stderr.startswith("WARNING kernels: torch's alone, native ones are not loaded: /nowhere/library.so")
    assert missing.stderr.endswith("; see `moe-cluster doctor`\n")


KERNELS = (
    "import json; from dataclasses import asdict; from cluster.doctor import examine\n"
    "print(json.dumps([asdict(f) for f in examine() if f.subject == 'kernels']))"
)


@pytest.mark.skipif(not variants(), reason="the native kernels are not built")
def test_the_chosen_kernels_are_named_and_a_wrong_choice_is_too():
    [chosen], [wrong], [off] = (
        json.loads(run(KERNELS, **{VARIABLE: value}).stdout) for value in ("plain", "fastest", "off")
    )
    assert chosen["found"].endswith("; plain computes")
    assert chosen["advice"] == ""
    assert wrong["advice"] == f"{VARIABLE}=fastest names none of them: unset it"
    assert off["advice"] == f"{VARIABLE}=off: without it they compute"


@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_without_native_kernels_it_says_how_to_build_them(compiler, tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    [found] = json.loads(run(KERNELS, PATH=str(tmp_path), CXX=compiler, **{LIBRARY_VARIABLE: "/nowhere.so"}).stdout)
    assert "native ones are not loaded: /nowhere.so" in found["found"]
    begin = "install a C++17 compiler" if compiler else "g++ is here: `pip install -v"
    assert found["advice"].startswith(begin)
    assert found["missing"] is False
