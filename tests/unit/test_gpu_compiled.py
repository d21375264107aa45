"""The GPU's kernels compile for real processors, though none is here: whether they run well, only one can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_linear", "_gate_up", "_down", "_combine", "_silu_mul", "_rms_norm", "_rotate_and_write", "_route", "_localize",
    "_attend", "_join",
}  # fmt: skip

# Of shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability". Code for 8.0 also runs on 8.6 and 8.9, which have less than its 163 KB.
MOST_BYTES = {80: 99 * 1024, 90: 227 * 1024}


@pytest.mark.slow
def test_each_launch_compiles_and_fits():
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "triton_compiling.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", script, *map(str, MOST_BYTES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    for capability, most in MOST_BYTES.items():
        its = [one for one in made if one["capability"] == capability]
        assert {one["name"] for one in its} == KERNELS
        assert {one["name"] for one in its if one["has_mma"]} == {"_linear", "_gate_up", "_down", "_attend"}
        narrow = {one["name"] for one in its if not one["has_wide_loads"]}
        assert not narrow & {"_linear", "_gate_up", "_down", "_attend"}, "weights are read two bytes at a time"
        assert {one["name"]: one["shared_bytes"] for one in its if one["shared_bytes"] > most} == {}
