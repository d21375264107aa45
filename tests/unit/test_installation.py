"""Installs the package into new virtual environments: with a compiler, without one, and with one that fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from cluster.checkpoint.made.demo import write_demo_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
NATIVE = "cluster/kernels/native"
PIP = [sys.executable, "-m", "pip", "--python"]
OPTIONS = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
ASK = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
import cluster
from cluster import LLM, SamplingParams
with LLM(sys.argv[1], dtype="float32", kv_cache_bytes=4 << 20) as llm:
    [answer] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
print(json.dumps([cluster.__file__, answer.token_ids]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source tree, without what was built in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "cluster", folder / "cluster", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    write_demo_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def unpacked(source, tmp_path_factory):
    """The sdist's contents."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built(source, "sdist", folder)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(folder / "unpacked")
    [contents] = (folder / "unpacked").iterdir()
    return contents


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Made of the sdist, with the compiler that is here, which takes less time for it: `.ci/wheels` makes fast ones."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("wheel")
    hasty = compiler(folder / "g++", 'exec g++ "$@" -O0')
    return built(shutil.copytree(unpacked, folder / "source"), "wheel", folder, CC=hasty, CXX=hasty)


def compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def built(source, kind, out, **environment):
    """The path of an sdist or a wheel."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=os.environ | environment, capture_output=True,
        text=True, timeout=500, check=True,
    )  # fmt: skip
    return out / done.stdout.splitlines()[-1]


@pytest.fixture
def python(tmp_path):
    """A new environment's interpreter, which finds all other packages here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=120)
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


def run(command, **environment):
    surroundings = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    for name in [name for name in surroundings if name.startswith(("MOE_", "PYTHON", "VIRTUAL"))]:
        del surroundings[name]
    done = subprocess.run(
        [*map(str, command)], env=surroundings | environment, capture_output=True, text=True, timeout=500, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def kernels(python):
    """The finding of `moe-cluster doctor`, as a user gets it."""
    answer = json.loads(run([python.parent / "moe-cluster", "doctor", "--json"]).stdout)
    assert answer["can_serve"]
    return {finding["subject"]: finding for finding in answer["findings"]}["kernels"]


def answer(python, checkpoint):
    """The tokens of an `LLM` and its log lines."""
    done = run([python, "-c", ASK, checkpoint])
    where, tokens = json.loads(done.stdout)
    assert Path(where).is_relative_to(python.parents[2])  # not the package that is tested elsewhere
    return tokens, done.stderr


def without_a_compiler(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty)}


def with_one_that_fails(tmp_path):
    return {"CC": "/bin/false", "CXX": "/bin/false"}


def with_one_that_is_too_old(tmp_path):
    """It does not know the newest vectors, as GCC 9."""
    old = compiler(
        tmp_path / "g++", 'case "$*" in *avx512_bf16*) echo unknown target >&2; exit 1;; esac\nexec g++ "$@" -O0'
    )
    return {"CC": old, "CXX": old}


@pytest.mark.parametrize(
    ("surroundings", "options"),
    [
        pytest.param(without_a_compiler, [], id="none"),
        pytest.param(with_one_that_fails, [], id="failing"),
        pytest.param(with_one_that_fails, ["-e"], id="failing, editable"),
        pytest.param(with_one_that_is_too_old, [], id="old"),
    ],
)
def test_without_a_fit_compiler_the_installation_succeeds_and_torch_computes(
    surroundings, options, source, python, checkpoint, tmp_path
):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    run([*PIP, python, *OPTIONS, *options, copy], **surroundings(tmp_path))
    found = kernels(python)
    assert found["found"].startswith("torch's alone, native ones are not built: no C++17 compiler was there")
    assert found["advice"]
    tokens, log = answer(python, checkpoint)
    assert log.startswith("kernels: torch's alone, native ones are not built")
    assert len(tokens) == 8


def test_with_a_compiler_native_kernels_compute_the_same_tokens(wheel, source, python, checkpoint):
    run([*PIP, python, *OPTIONS, wheel])
    assert kernels(python)["found"].startswith("native, ")
    tokens, log = answer(python, checkpoint)
    assert log.startswith("kernels: native ")
    run([*PIP, python, *OPTIONS, "--force-reinstall", source], **with_one_that_fails(python))
    assert answer(python, checkpoint)[0] == tokens


def test_the_sdist_has_the_sources(unpacked):
    sources = {path.name for pattern in ("*.cpp", "*.inc", "*.h") for path in (ROOT / NATIVE).glob(pattern)}
    assert len(sources) > 8
    assert sources <= {path.name for path in (unpacked / NATIVE).iterdir()}
    assert not list(unpacked.rglob("*.so"))


def test_a_wheel_has_the_library_for_all_pythons(wheel, tmp_path):
    """The library calls no function of Python's."""
    oldest = re.findall(
        r">=3\.(\d+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-cp3{oldest[0]}-abi3-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = f"{NATIVE}/_kernels.abi3.so"
        assert library in names
        archive.extract(library, tmp_path / "wheel")
    symbols = subprocess.run(["nm", "-D", tmp_path / "wheel" / library], capture_output=True, text=True, check=True)
    assert not re.search(r" U _?Py", symbols.stdout)
