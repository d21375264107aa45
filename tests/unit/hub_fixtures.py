"""Fixtures: a checkpoint, a hub on loopback that has it, and an empty cache."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import DENSE, EXPERTS, NAME, Hub, repository_of, serve
from huggingface_hub import hf_api
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file

from cluster.checkpoint.made.demo import write_demo_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo checkpoint whose experts below 32 are in one file, the others in another, all else in a third."""
    folder = tmp_path_factory.mktemp("hub") / "demo-moe"
    write_demo_checkpoint(folder)
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    file_of = {name: _file_of(name) for name in tensors}
    for file in (DENSE, *EXPERTS):
        save_file({name: t for name, t in tensors.items() if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


def _file_of(name: str) -> str:
    _, experts, rest = name.partition(".mlp.experts.")
    return EXPERTS[int(rest.partition(".")[0]) // 32] if experts else DENSE


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with NAME, and an empty cache."""
    with serve(tiny__demo_moe=repository_of(checkpoint)) as server:
        server.repositories[NAME] = server.repositories.pop("tiny/demo_moe")
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
