"""Fixtures: a checkpoint, a hub on loopback that has it, and an empty cache."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import NAME, Hub, repository_of, serve, write_in_parts
from huggingface_hub import hf_api
from huggingface_hub.utils import close_session


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of `write_in_parts`."""
    folder = tmp_path_factory.mktemp("hub") / "demo-moe"
    write_in_parts(folder)
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with NAME, and an empty cache."""
    with serve({NAME: repository_of(checkpoint)}) as server:
        for name, value in {
            "ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
        }.items():  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)  # as its variables would set them in a process
        monkeypatch.setattr(hf_api.api, "endpoint", server.address)
        for variable in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        close_session()
        yield server
        close_session()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
