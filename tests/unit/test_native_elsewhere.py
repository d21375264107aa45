"""The native kernels' tests once more: with sanitizers, and their plain variant on an emulated ARM processor."""

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from native_replay import CALLS, differences, recorded_calls

from cluster.kernels.native.library import LIBRARY_VARIABLE, VARIABLE, variants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "cluster" / "kernels" / "native"
TESTS = sorted(path for path in (ROOT / "tests" / "unit").glob("test_native_*.py") if path.name != Path(__file__).name)
[EXTENSION] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARM = "aarch64-linux-gnu-g++", "qemu-aarch64"


def lacking(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def compiled(compiler, sources, folder, *flags):
    """Object files, with the flags of the installation and some more."""

    def compile_one(source):
        made = folder / f"{Path(source).stem}.o"
        command = [compiler, *EXTENSION["extra-compile-args"], *flags, f"-I{NATIVE}", "-c", source, "-o", made]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def run_tests(*options, **environment):
    surroundings = {name: value for name, value in os.environ.items() if name not in (VARIABLE, LIBRARY_VARIABLE)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *map(str, TESTS)]
    return subprocess.run(
        command, env=surroundings | environment, cwd=ROOT, capture_output=True, text=True, timeout=800
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The environment of a process in which every memory that is allocated has borders, and the library checks them."""
    folder = tmp_path_factory.mktemp("sanitized")
    # -O1 compiles for twice as long (120 s of CPU to 60), and these tests, which are small, run for a tenth less.
    objects = compiled("g++", EXTENSION["sources"], folder, "-O0", "-g1", "-fPIC", *SANITIZERS)
    subprocess.run(["g++", "-shared", *SANITIZERS, *objects, "-o", folder / "kernels.so"], check=True, timeout=120)
    # The C++ library too: else an exception of torch's, thrown before it is loaded, finds no handler.
    first = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        LIBRARY_VARIABLE: str(folder / "kernels.so"),
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at its end
    }


@lacking("g++")
def test_with_sanitizers_every_variants_tests_pass(sanitized):
    done = run_tests(**sanitized)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert f"native kernels: {', '.join(variants())}" in done.stdout


PAST = """
import torch
from cluster.kernels.native.library import variants
memory = torch.zeros(1 << 16, dtype=torch.uint8)
assert variants()["plain"].read(memory.data_ptr(), memory.numel(), 1) == 0
variants()["plain"].read(memory.data_ptr(), 2 * memory.numel(), 1)
"""


@lacking("g++")
def test_the_sanitizers_see_a_kernel_that_reads_past_a_tensor(sanitized):
    done = subprocess.run(
        [sys.executable, "-c", PAST], env=os.environ | sanitized, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@lacking(*ARM)
def test_on_arm_the_plain_variant_gives_the_same_bits(tmp_path):
    """The calls of all tests, recorded here. Without fused products, which this machine's plain variant has not."""
    calls = tmp_path / "calls"
    done = run_tests("-p", "native_replay", "-k", "plain", **{CALLS: str(calls)})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    ends, never_recorded = recorded_calls(calls)
    assert len(ends) > 20
    assert not never_recorded
    sources = [*EXTENSION["sources"], str(ROOT / "tests" / "native" / "replay.cpp")]
    objects = compiled(ARM[0], sources, tmp_path, "-ffp-contract=off")
    subprocess.run([ARM[0], "-static", *objects, "-o", tmp_path / "replay"], check=True, timeout=120)
    subprocess.run([ARM[1], tmp_path / "replay", calls, tmp_path / "results"], check=True, timeout=600)
    data = (tmp_path / "results").read_bytes()
    assert differences(ends, data)[:20] == []
    other = (np.frombuffer(data, np.uint8) ^ 1).tobytes()
    assert {kernel for kernel, _ in differences(ends, other)} == {call.kernel for call in ends}
