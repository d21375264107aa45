"""The model that the package has, by its name: everywhere the same files, or none."""

import shutil

import pytest

from cluster.checkpoint import shipped
from cluster.checkpoint.info import model_info
from cluster.checkpoint.model_files import is_name, located, open_files, pinned, served_name
from cluster.config import EngineConfig
from cluster.engine.preflight import check_checkpoint
from cluster.errors import CheckpointError


def test_the_name_stays_a_name_until_the_files_are_opened():
    """So that each node finds the files where its package is."""
    assert located("demo") == "demo"
    name = pinned("demo")
    assert name.startswith("demo@")
    assert (located(name), pinned(name), served_name(name)) == (name, name, "demo")
    assert open_files(name).directory == open_files("demo").directory
    assert open_files("demo").is_file("config.json")
    assert is_name("demo")
    assert is_name("Qwen/Qwen2-57B-A14B")
    assert not is_name("demo-moe")


def test_another_revision_is_refused_by_name():
    for ask in (pinned, open_files):
        with pytest.raises(CheckpointError, match=r"^demo@0123 is not in this installation.*has demo@[0-9a-f]{12}"):
            ask("demo@0123")
    with pytest.raises(CheckpointError, match="demo@ is not in this installation"):
        open_files("demo@")


def test_the_revision_is_that_of_the_contents(tmp_path, monkeypatch):
    """Of weights, tokenizer and configs; the description may change."""
    copy = shutil.copytree(shipped.shipped_directory("demo"), tmp_path / "demo")
    monkeypatch.setattr(shipped, "_directory", lambda: copy)
    before = pinned("demo")
    (copy / "README.md").write_text("another description")
    assert pinned("demo") == before
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert pinned("demo") != before
    with pytest.raises(CheckpointError, match="install the same version"):
        open_files(before)


def test_a_directory_of_the_users_goes_before_the_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert located("demo") == str(tmp_path / "demo")
    assert pinned("demo") == "demo"
    assert open_files("demo").directory.resolve() == tmp_path / "demo"


def test_its_files_pass_the_checks_of_any_checkpoint():
    check_checkpoint("demo", EngineConfig(), 2, tokenizer=True)
    info = model_info(pinned("demo"), EngineConfig())
    assert (info.model_id, info.num_experts, info.num_experts_per_tok, info.dtype) == ("demo", 64, 4, "bfloat16")
    assert sum(path.stat().st_size for path in open_files("demo").directory.glob("*.safetensors")) < 8_000_000
