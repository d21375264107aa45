"""A processor runs the variants of the native kernels whose vectors it has, and no other."""

import ctypes
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from cluster.kernels.native.library import VARIANTS, variants

ROOT = Path(__file__).resolve().parents[2]
[EXTENSION] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
X86 = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
}
X86["amx_bf16"] = {*X86["avx512_bf16"], "amx_tile", "amx_bf16"}
CPUINFO = Path("/proc/cpuinfo")
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def lends_tiles():
    """Whether Linux lets this process use AMX's registers; some sandboxes do not."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


@pytest.mark.skipif(not variants() or not CPUINFO.exists(), reason="the native kernels are not built, or no Linux")
def test_the_variants_are_those_whose_vectors_the_kernel_of_linux_lists():
    flags = next((line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")), "").split()
    expected = {"plain"} | {name for name, needed in X86.items() if needed <= set(flags)}
    if "amx_bf16" in expected and not lends_tiles():
        expected.remove("amx_bf16")
    assert variants().keys() & {"plain", *X86} == expected


def test_a_change_of_any_source_builds_the_library_again():
    """setuptools compiles where a file of these lists is newer than the library."""
    files = {path for path in (ROOT / "cluster/kernels/native").iterdir() if path.suffix in (".cpp", ".h", ".inc")}
    assert {ROOT / path for path in (*EXTENSION["sources"], *EXTENSION["depends"])} == files


@pytest.fixture(scope="module")
def lister(tmp_path_factory):
    """Builds a program that prints the variants; returns its path. Needs no Python where it runs."""

    def build(*flags):
        if shutil.which("g++") is None:
            pytest.skip("no g++")
        program = tmp_path_factory.mktemp("lister") / "lister"
        sources = [*EXTENSION["sources"], "tests/native/replay.cpp"]
        fast = [*EXTENSION["extra-compile-args"], "-O0", *flags, f"-I{ROOT}/cluster/kernels/native"]
        subprocess.run(["g++", *fast, *sources, "-static", "-o", program], cwd=ROOT, check=True, timeout=600)
        return program

    return build


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64")
def test_other_processors_run_those_that_they_can(lister):
    """Emulated: one without vectors beyond SSE, and one with AVX2 alone. The emulator has no AVX-512."""
    program = lister()

    def listed(processor):
        command = ["qemu-x86_64", "-cpu", processor, program, *VARIANTS]
        return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())

    assert listed("Nehalem") == {"plain"}
    assert listed("Haswell") == {"plain", "avx2"}


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in variants(), reason="this processor has no AVX-512 BF16")
def test_an_older_compiler_leaves_out_the_variant_that_it_does_not_know(lister):
    """GCC 9 has no AVX-512 BF16; this one says that it is GCC 9."""
    program = lister("-U__GNUC__", "-D__GNUC__=9")
    done = subprocess.run([program, *VARIANTS], capture_output=True, text=True, check=True, timeout=60)
    found = set(done.stdout.split())
    assert {"plain", "avx2", "avx512"} <= found
    assert "avx512_bf16" not in found
