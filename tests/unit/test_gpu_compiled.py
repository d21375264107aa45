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

# Of shared memory that a block may have: 99 KB on capability 8.6 and 8.9, more on 8.0, 9.0 and 10.0 (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
MOST_BYTES = 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_each_launch_compiles_and_fits(capability):
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "triton_compiling.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in made} == KERNELS
    for one in made:
        assert one["capability"] == capability
        assert one["shared_bytes"] <= MOST_BYTES, one
    assert {one["name"] for one in made if one["has_mma"]} == {"_linear", "_gate_up", "_down", "_attend"}
