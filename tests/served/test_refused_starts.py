"""The error of a process that cannot start reaches the terminal of `moe-cluster serve`.

Random weights, which processes draw themselves, pass every check of files, whatever size the config gives them.
"""

import json
import os
import subprocess

import pytest
from serving_tools import COMMAND, ONE_ATTEMPT, PORTS, TINY

from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.drawn import SEED_KEY

pytestmark = pytest.mark.slow  # a cluster of its own


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"moe_intermediate_size": 2**27}, "did not load in 5 attempts"),
        ({"vocab_size": 2**31 - 1}, "Ray Serve did not start the application: RuntimeError: "),
    ],
    ids=["a shard", "an engine"],
)
def test_what_has_no_memory_says_how_much_it_wanted(tmp_path, sizes, named):
    model_dir = tmp_path / "model"
    write_demo_checkpoint(model_dir)
    for path in model_dir.glob("*.safetensors"):
        path.unlink()
    raw = json.loads((model_dir / "config.json").read_text())
    raw |= {SEED_KEY: 1, "hidden_size": 4096, **sizes}
    (model_dir / "config.json").write_text(json.dumps(raw))
    arguments = [*COMMAND, "serve", str(model_dir), *TINY, *PORTS]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, env=os.environ | ONE_ATTEMPT)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moe-cluster: ")
    assert named in last
    assert "can't allocate memory: you tried to allocate" in last
    assert "Traceback" not in done.stderr + done.stdout
