"""One checkpoint and one oracle for each configuration."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from configs import CONFIGS, DENSE_CONFIGS
from head_tools import Written, write
from parity_tools import Oracle, ask_transformers

from cluster.checkpoint.made.synthetic import write_checkpoint


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A cell of docs/models.md's table that is skipped, or is expected to fail, has proven nothing: it fails."""
    report = yield
    if report.skipped and item.name.startswith("test_a_cell["):
        report.outcome = "failed"
    return report


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


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """A checkpoint with a head, of a family and a head's name, made once; changes: of its config."""
    made: dict[str, Written] = {}

    def get(family: str, head: str, **changes: Any) -> Written:
        key = json.dumps([family, head, changes])
        if key not in made:
            made[key] = write(tmp_path_factory.mktemp("heads") / "model", family, head, **changes)
        return made[key]

    return get
