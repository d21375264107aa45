"""A config.json with a seed stands for a whole checkpoint: its tensors are drawn, the same wherever they are wanted."""

import json

import pytest
import torch
from configs import config, dense

from cluster.bench.checkpoint import STORED, stored_checkpoint
from cluster.checkpoint.made.drawn import SEED_KEY
from cluster.checkpoint.opening import open_checkpoint
from cluster.errors import CheckpointError
from cluster.model.registry import load_model

NAMES = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")


def opened(folder, seed, raw=None):
    (folder / "config.json").write_text(json.dumps((raw or dense()) | {SEED_KEY: seed}))
    checkpoint = open_checkpoint(folder)
    checkpoint.check_tensors()
    return checkpoint


def drawn(checkpoint):
    targets = {name: torch.zeros(64, 64) for name in NAMES}
    assert checkpoint.load(targets) == len(NAMES) * 64 * 64 * 4
    return targets


def test_a_tensor_depends_on_the_seed_and_its_name_only(tmp_path):
    first, again, other = drawn(opened(tmp_path, 1)), drawn(opened(tmp_path, 1)), drawn(opened(tmp_path, 2))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert not any(torch.equal(first[name], other[name]) for name in NAMES)
    assert not torch.equal(first[NAMES[0]], first[NAMES[1]])
    assert first["model.norm.weight"].mean() == pytest.approx(1.0, abs=0.01)
    assert first[NAMES[0]].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("form", STORED)
def test_a_rounded_one_is_drawn_in_its_form(tmp_path, form):
    """As benches make it of another one's shapes. Weights are as large as plain ones that are drawn."""
    (tmp_path / "config.json").write_text(json.dumps(dense(hidden_size=128, intermediate_size=256)))
    folder = stored_checkpoint(tmp_path, form, tmp_path)
    assert folder == stored_checkpoint(tmp_path, form, tmp_path)
    checkpoint = open_checkpoint(folder)
    model = load_model(
        checkpoint, dtype=torch.float32, device=torch.device("cpu"), quantization=checkpoint.config.stored
    )
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert weight.dequantized().std() == pytest.approx(0.02, rel=0.6)
    assert weight.nbytes < 128 * 256 * 1.4


def test_its_config_is_read_as_any_other(tmp_path):
    assert opened(tmp_path, 0, config()).config.num_experts == 60
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{SEED_KEY} is -1, a whole number from 0"):
        opened(tmp_path, -1)


def test_without_a_seed_weight_files_are_wanted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dense()))
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        (tmp_path / "config.json").unlink()
        open_checkpoint(tmp_path)
