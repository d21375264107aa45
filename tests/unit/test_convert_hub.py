"""`convert` of a model by its name on the hub, whose files come first. Against a hub on loopback."""

from pathlib import Path

import pytest
import torch
from hub_server import NAME, Hub
from safetensors.torch import load_file

from cluster import cli
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.opening import open_checkpoint

pytest_plugins = ["hub_fixtures"]


def tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in model_dir.glob("*.safetensors") for k, v in load_file(path).items()}


def test_a_model_on_the_hub_is_converted_by_its_name(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", NAME, str(tmp_path / "out")]) == 0
    stored, found = tensors(checkpoint), tensors(tmp_path / "out")
    assert found.keys() == stored.keys() == checkpoint_shapes(open_checkpoint(checkpoint).config).keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_pickles_on_the_hub_are_named_with_the_command_that_takes_them(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = hub.repositories[NAME].files
    stored = tensors(checkpoint)
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    torch.save(stored, tmp_path / "pickle")
    files["pytorch_model.bin"] = (tmp_path / "pickle").read_bytes()
    assert cli.main(["convert", NAME, str(tmp_path / "out")]) == 2
    assert f"`moe-cluster convert --from-pickle {NAME}" in capsys.readouterr().err
    assert cli.main(["convert", "--from-pickle", NAME, str(tmp_path / "out")]) == 0
    found = tensors(tmp_path / "out")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
