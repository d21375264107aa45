"""Runs other programs' clients, each in an environment of its own.

`$CLIENTS` is the Python of an environment with the packages of tests/clients/requirements.txt, `$OPENAI_NPM` a folder
with npm's package openai (CONTRIBUTING.md); `.ci/run` makes both. `$VLLM` is the Python of one with vLLM. Without them
their tests are skipped.
"""

import os
import shutil
import subprocess

import pytest

# No telemetry, no look at a server for prices or models.
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGCHAIN_TRACING_V2": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip
with_clients = pytest.mark.skipif("CLIENTS" not in os.environ, reason="CLIENTS names no Python with the clients")
with_vllm = pytest.mark.skipif("VLLM" not in os.environ, reason="VLLM names no Python with vLLM")
with_npm = pytest.mark.skipif(
    "OPENAI_NPM" not in os.environ or shutil.which("node") is None, reason="OPENAI_NPM names no folder of npm's openai"
)


def run(*command, **environment):
    """Returns what the client wrote; fails with all of it where it fails."""
    environment = {**os.environ, **QUIET, **environment}
    found = subprocess.run(map(str, command), env=environment, text=True, timeout=240, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout
