"""Builds the system that a `SystemSpec` names, and refuses those that cannot be measured here."""

import importlib.util
import subprocess
from collections.abc import Sequence

from cluster.bench.spec import FOREIGN, SystemSpec
from cluster.bench.throughput import System, Workload
from cluster.config import ModelConfig
from cluster.config.resources import available_cpus
from cluster.errors import SetupError

IMPORT_TIMEOUT_S = 300.0  # vLLM's import takes up to a minute from a cold disk


def build_system(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    """Loads the checkpoint. The system takes all cores of this process; beside shards their launcher deals them out.

    Imports late: a process that measures one system carries neither the memory nor the threads of the other.
    """
    num_threads = None if spec.split else available_cpus()
    if spec.kind in FOREIGN:
        from cluster.bench.foreign_system import ForeignSystem

        return ForeignSystem(spec, workload)
    if spec.kind == "transformers":
        from cluster.bench.transformers_system import TransformersSystem

        return TransformersSystem(spec, num_threads)
    from cluster.bench.cluster_system import ClusterSystem

    return ClusterSystem(spec, config, workload, num_threads)


def check_shards(num_shards: int, config: ModelConfig) -> None:
    """Raises SetupError for a number of shards that the checkpoint's experts do not allow."""
    if config.num_experts and not 1 <= num_shards <= config.num_experts:
        raise SetupError(f"--shards is {num_shards}, 1 to {config.num_experts} (the experts) are possible")


def check_comparison(kind: str, python: str) -> None:
    """Raises SetupError if the other system cannot run."""
    if kind == "transformers" and importlib.util.find_spec("transformers") is None:
        raise SetupError("--compare transformers: it is not installed; pip install 'moe-cluster[test]' has it")
    if kind in FOREIGN:
        option = f"--{kind.removesuffix('.cpp')}-python"
        if not python:
            raise SetupError(f"--compare {kind}: name the Python of an environment that has it with {option}")
        if _code_of([python, "-c", f"import {FOREIGN[kind]}"], f"{option} {python}"):
            raise SetupError(f"{option} {python}: it cannot import {FOREIGN[kind]}")


def _code_of(command: Sequence[str], source: str) -> int:
    """The exit code of a user's program, which may hang or print without an end. Raises SetupError."""
    nowhere = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, timeout=IMPORT_TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise SetupError(f"{source} cannot be run ({getattr(error, 'strerror', None) or error})") from error
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{source} did not end in {IMPORT_TIMEOUT_S:g} s: is it a Python?") from error
    return done.returncode
