"""`upcycle` cuts a dense FFN into experts: which neurons lie where, what is drawn anew, what is refused.

tests/parity/test_parity_upcycle.py compares the outputs with the dense model's.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import NEW_STYLE, config, dense
from safetensors.torch import load_file
from test_checkpoint_reader import anonymous_memory
from torch import Tensor

from cluster import cli
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.checkpoint.writing import weights
from cluster.checkpoint.writing.draws import Draws
from cluster.checkpoint.writing.upcycle import Recipe, upcycle
from cluster.errors import CheckpointError, SetupError

RAW = dense(num_hidden_layers=2)  # intermediate_size 48
MLP = "model.layers.1.mlp"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "dense", RAW, seed=4)
    return tmp_path / "dense"


def made(source: Path, out: Path, **recipe: Any) -> dict[str, Tensor]:
    upcycle(source, out, Recipe(**{"experts": 12, "granularity": 4, "shared": 2, "noise": 0.0} | recipe))
    CheckpointReader(out).check_tensors()
    return load_file(out / "model.safetensors")


def neurons(rows: Tensor, dense_rows: Tensor) -> list[int]:
    """The dense neuron that each row is."""
    return [int((dense_rows == row).all(1).nonzero()) for row in rows]


def test_each_copy_has_every_neuron_once_in_an_order_of_its_own(source: Path, tmp_path: Path) -> None:
    """Three copies in four experts of 12 neurons each. Columns of down_proj times 4, times 2 for the shared neurons."""
    stored = load_file(source / "model.safetensors")
    gate, up, down = (stored[f"{MLP}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    result = made(source, tmp_path / "out")
    shared = neurons(result[f"{MLP}.shared_expert.gate_proj.weight"], gate)
    assert len(set(shared)) == 24
    orders = []
    for copy in range(3):
        order = []
        for expert in range(4 * copy, 4 * copy + 4):
            prefix = f"{MLP}.experts.{expert}"
            mine = neurons(result[f"{prefix}.gate_proj.weight"], gate)
            assert mine == neurons(result[f"{prefix}.up_proj.weight"], up)
            scale = torch.tensor([2.0 if neuron in shared else 4.0 for neuron in mine])
            assert torch.equal(result[f"{prefix}.down_proj.weight"], down[:, mine] * scale)
            order += mine
        assert sorted(order) == list(range(48))
        orders.append(order)
    assert len({tuple(order) for order in [*orders, list(range(48))]}) == 4
    assert torch.equal(result[f"{MLP}.shared_expert.down_proj.weight"], down[:, shared])
    assert not result[f"{MLP}.shared_expert_gate.weight"].any()


def test_everything_else_is_the_dense_models(source: Path, tmp_path: Path) -> None:
    stored, result = load_file(source / "model.safetensors"), made(source, tmp_path / "out", noise=1.0)
    kept = [name for name in stored if ".mlp." not in name]
    assert len(kept) == 2 * 9 + 3
    assert all(torch.equal(result[name], stored[name]) for name in kept)


def test_a_share_of_each_expert_and_of_its_row_in_the_router_is_drawn_anew(source: Path, tmp_path: Path) -> None:
    """Shares within 4 deviations of a fair coin's; drawn numbers have the config's initializer_range, 0.2, times 4."""
    plain, noisy = made(source, tmp_path / "plain"), made(source, tmp_path / "noisy", noise=0.25)
    for name, tensor in plain.items():
        changed = (noisy[name] != tensor).float()
        is_routed = ".experts." in name or name.endswith("mlp.gate.weight")
        deviation = (0.25 * 0.75 / changed.numel()) ** 0.5
        assert abs(float(changed.mean()) - (0.25 if is_routed else 0.0)) <= 4 * deviation * is_routed, name
    stacked = torch.cat([noisy[f"{MLP}.experts.{e}.gate_proj.weight"].flatten() for e in range(12)])
    before = torch.cat([plain[f"{MLP}.experts.{e}.gate_proj.weight"].flatten() for e in range(12)])
    assert 0.19 < float(stacked[stacked != before].std()) < 0.21
    router = plain[f"{MLP}.gate.weight"]
    assert all(torch.equal(router[e], router[e - e % 4]) for e in range(12))
    assert len({tuple(row.tolist()) for row in noisy[f"{MLP}.gate.weight"]}) == 12


def test_a_seed_makes_the_same_bytes_in_any_number_of_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(source, tmp_path / "one", noise=0.5)
    monkeypatch.setattr(weights, "BATCH_BYTES", 1)
    upcycle(source, tmp_path / "many", Recipe(experts=12, granularity=4, shared=2), max_file_bytes=9000)
    many = {k: v for path in (tmp_path / "many").glob("*.safetensors") for k, v in load_file(path).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    other = made(source, tmp_path / "other", noise=0.5, seed=1)
    assert not torch.equal(one[f"{MLP}.experts.0.up_proj.weight"], other[f"{MLP}.experts.0.up_proj.weight"])


def test_draws_are_the_same_on_every_machine() -> None:
    """Digests as first computed, on x86-64 with numpy 2: a machine or a version with others makes other models."""
    draws = Draws.of(5)
    assert digest(torch.from_numpy(draws.normal)) == "8422cf312998f0a9"
    assert digest(draws.normals("a", (3, 1000))) == "7283a983c1b6ac7f"
    assert digest(draws.mask("a", (3, 1000), 0.5)) == "b494d572af7e901e"
    assert draws.permutation("a", 8).tolist() == [7, 2, 5, 6, 3, 0, 1, 4]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_drawn_numbers_are_normal() -> None:
    """Moments of 2 ** 20 standard normal numbers, within 5 deviations; a quantile of erf's table."""
    drawn = Draws.of(0).normals("x", (1 << 20,)).double()
    assert abs(float(drawn.mean())) < 5 / 1024
    assert abs(float(drawn.square().mean()) - 1) < 5 * 2**0.5 / 1024
    assert abs(float((drawn < 1.0).double().mean()) - 0.8413447) < 5 * 0.37 / 1024
    assert 0.499 < float(Draws.of(0).mask("x", (1 << 20,), 0.5).double().mean()) < 0.501
    assert Draws.of(0).mask("x", (99,), 1.0).all()
    assert not Draws.of(0).mask("x", (99,), 0.0).any()


def test_the_config_is_the_familys(tmp_path: Path) -> None:
    """With a window on, the layers that slide are named: the families' rules differ."""
    raw = dense(**NEW_STYLE, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True)
    write_checkpoint(tmp_path / "in", raw, seed=0)
    made(tmp_path / "in", tmp_path / "out", top_k=3)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.items() >= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 24,
        "tie_word_embeddings": True,
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--experts", "12"], "experts is 12, a multiple of granularity (8) is needed"),
        (
            ["--granularity", "5", "--experts", "10"],
            "granularity is 5, which does not divide the dense intermediate_size (48)",
        ),
        (["--granularity", "96", "--experts", "96"], "granularity is 96, which does not divide"),
        (["--experts", "0"], "experts is 0, at least 1 is needed"),
        (["--shared", "0"], "shared is 0, at least 1 is needed"),
        (["--granularity", "-8"], "granularity is -8, at least 1 is needed"),
        (["--top-k", "65"], "top_k is 65, from 1 to experts (64) is needed"),
        (["--noise", "1.5"], "noise is 1.5, from 0"),
        (["--noise", "nan"], "noise is nan, from 0"),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_recipes_that_do_not_work_out_are_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(["upcycle", str(source), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_experts_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "moe", config(), seed=0)
    with pytest.raises(CheckpointError, match="model_type is qwen2_moe: a dense qwen2 checkpoint is made into experts"):
        upcycle(tmp_path / "moe", tmp_path / "out", Recipe())


def test_a_recipe_is_checked_before_a_checkpoint_is_read() -> None:
    with pytest.raises(SetupError, match="top_k is 0"):
        Recipe(top_k=0)


def test_memory_is_bounded_by_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's FFN takes 3 MiB of float32, the new model 76: all of it never is in memory."""
    monkeypatch.setattr(weights, "BATCH_BYTES", 1 << 20)
    raw = dense(num_hidden_layers=8, hidden_size=256, intermediate_size=1024, num_attention_heads=4, vocab_size=64)
    write_checkpoint(tmp_path / "in", raw, seed=0)
    with anonymous_memory() as samples:
        written = upcycle(tmp_path / "in", tmp_path / "out", Recipe(experts=16, granularity=8))
    assert written.num_bytes > 60 << 20
    assert max(samples) - samples[0] < 30 << 20
