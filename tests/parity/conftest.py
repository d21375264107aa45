"""One checkpoint and one oracle for each configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest
from configs import CONFIGS, DENSE_CONFIGS
from parity_tools import Oracle, ask_transformers

from cluster.checkpoint.made.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            model_dir: Path = tmp_path_factory.mktemp("parity") / "model"
            write_checkpoint(model_dir, (CONFIGS | DENSE_CONFIGS)[name], seed=len(name))
            made[name] = ask_transformers(model_dir)
        return made[name]

    return get


@pytest.fixture(params=[*CONFIGS, *DENSE_CONFIGS])
def oracle(request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]) -> Oracle:
    return oracle_of(request.param)


@pytest.fixture(params=list(CONFIGS))
def moe_oracle(request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]) -> Oracle:
    """Of a model with routed experts."""
    return oracle_of(request.param)
