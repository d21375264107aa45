"""The forms of weights, the loader that fills them, and that nobody asks for the form."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from weight_tools import HalvedWeight, ScaledWeight

from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.experts.shard import ExpertShard
from cluster.kernels.experts import SeparateExperts, StackedExperts
from cluster.kernels.weights import PackedWeight, PlainWeight, WeightLoader, packs
from cluster.model.layers.linear import Linear

PACKAGE = Path(__file__).resolve().parents[2] / "cluster"
RAW = {
    "model_type": "qwen2_moe", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 6,
    "shared_expert_intermediate_size": 20, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def make_plain(num_outputs, num_inputs):
    return PlainWeight(torch.empty(num_outputs, num_inputs, dtype=torch.bfloat16))


FORMS = [
    make_plain,
    pytest.param(
        PackedWeight,
        marks=pytest.mark.skipif(not packs(torch.bfloat16, torch.device("cpu")), reason="weights are not packed here"),
    ),
    HalvedWeight,
]


@pytest.mark.parametrize("make", FORMS)
def test_linear_layers_of_any_form_give_the_products_of_their_parts_side_by_side(make):
    """q, k and v with biases, and rows from fewer than the form's least to many."""
    random = torch.Generator().manual_seed(1)
    stored = {}
    for name, size in (("q", 6), ("k", 4), ("v", 2)):
        stored[f"layer.{name}.weight"] = torch.randn(size, 16, generator=random).bfloat16()
        stored[f"layer.{name}.bias"] = torch.randn(size, generator=random).bfloat16()
    linear = Linear(16, {"q": 6, "k": 4, "v": 2}, bias=True)
    linear.allocate(make, dtype=torch.bfloat16, device=torch.device("cpu"))

    def read(targets):
        for name, target in targets.items():
            target.copy_(stored[name])

    loader = WeightLoader(read)
    loader.load([(linear.weight, linear.parts("layer."))], linear.bias_targets("layer."))
    for num_rows in (1, 2, 5, 40):
        x = torch.randn(num_rows, 16, generator=random).bfloat16()
        with torch.inference_mode():
            for name, got in zip("qkv", linear(x).split([6, 4, 2], dim=-1), strict=True):
                weight, bias = stored[f"layer.{name}.weight"].double(), stored[f"layer.{name}.bias"].double()
                torch.testing.assert_close(got.double(), F.linear(x.double(), weight, bias), atol=6e-2, rtol=2e-2)


def test_a_weight_names_the_tensors_that_it_needs():
    """As a quantized checkpoint has several for one matrix. Gate is 2 * (1, -1) and 3 * (0, 4), up is 5 * (1, 1): for
    x = (10, 1) that is 18, 12 and 55."""
    stored = {
        "mlp.gate_proj.qweight": [[1, -1], [0, 4]], "mlp.gate_proj.scales": [2.0, 3.0],
        "mlp.up_proj.qweight": [[1, 1]], "mlp.up_proj.scales": [5.0],
    }  # fmt: skip
    calls = []

    def read(targets):
        calls.append(sorted(targets))
        for name, target in targets.items():
            target.copy_(torch.tensor(stored[name]))

    linear = Linear(2, {"gate_proj": 2, "up_proj": 1})
    linear.allocate(ScaledWeight, dtype=torch.float32, device=torch.device("cpu"))
    WeightLoader(read).load([(linear.weight, linear.parts("mlp."))])
    gate, up = linear(torch.tensor([[10.0, 1.0]])).split([2, 1], dim=-1)
    assert (gate.tolist(), up.tolist()) == ([[18.0, 12.0]], [[55.0]])
    assert calls == [sorted(stored)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoint(folder, RAW, seed=1)
    return CheckpointReader(folder)


def expert_output(reader, layer_id, expert_id, x):
    """Of one expert, from the checkpoint's three matrices in float64."""
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    shapes = {"gate": (16, 32), "up": (16, 32), "down": (32, 16)}
    stored = {f"{prefix}.{part}_proj.weight": torch.empty(shape) for part, shape in shapes.items()}
    reader.load(stored)
    gate, up, down = (tensor.double() for tensor in stored.values())
    return F.linear(F.silu(F.linear(x.double(), gate)) * F.linear(x.double(), up), down)


def experts_of(make):
    """No experts yet, in a form of weights; without one in the form that GPUs have."""
    if make is None:
        empty = (torch.empty(0, *shape, dtype=torch.bfloat16) for shape in ((32, 32), (32, 16)))
        return StackedExperts(*empty)
    return SeparateExperts(lambda: make(32, 32), lambda: make(32, 16))


@pytest.mark.parametrize("make", [*FORMS, None])
def test_a_shard_changes_its_slice_whatever_form_its_weights_have(reader, make):
    """Experts that stay move to another place; what was read before is not read again."""
    shard = ExpertShard(0, reader.config, dtype=torch.bfloat16, device=torch.device("cpu"))
    shard._no_experts = experts_of(make)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    num_bytes = []
    for slices in ({0: [3, 1], 1: [0]}, {0: [1, 4, 3]}, {0: [5]}):
        progress = []
        shard.load(reader, slices, progress.append)
        num_bytes.append(sum(progress))
        for layer_id, expert_ids in slices.items():
            for expert_id in expert_ids:
                got = shard.forward(layer_id, x, torch.full((5, 1), expert_id), torch.ones(5, 1))
                expected = expert_output(reader, layer_id, expert_id, x)
                torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=5e-2)
    expert_bytes = 2 * 3 * 16 * 32
    assert num_bytes == [3 * expert_bytes, expert_bytes, expert_bytes]
    assert shard.num_bytes == expert_bytes


def test_weights_with_staging_memory_share_it_and_the_others_are_read_together():
    calls, places = [], set()

    def read(targets):
        calls.append(sorted(targets))
        places.update(target.data_ptr() for name, target in targets.items() if name.startswith("staged"))

    staged = [(HalvedWeight(4, size), {f"staged{size}": 4}) for size in (8, 16, 2)]
    direct = [(make_plain(2, 2), {f"direct{i}": 2}) for i in range(2)]
    WeightLoader(read).load([*staged, *direct], {"norm": torch.empty(3)})
    assert calls == [
        ["staged8.weight"], ["staged16.weight"], ["staged2.weight"], ["direct0.weight", "direct1.weight", "norm"]
    ]  # fmt: skip
    assert len(places) == 1


def test_nobody_asks_which_form_a_weight_has():
    """A new form must work everywhere: no `isinstance` names a class of weights, nor `nn.Linear`, nor a tensor in the
    place of a weight."""
    homes = [PACKAGE / "kernels" / name for name in ("weights.py", "experts.py")]
    forms = {node.name for home in homes for node in ast.parse(home.read_text()).body if isinstance(node, ast.ClassDef)}
    assert {"Weight", "PlainWeight", "PackedWeight", "ExpertWeights"} < forms
    tensors_banned = {*homes, PACKAGE / "experts" / "shard.py", *(PACKAGE / "model").rglob("*.py")}
    asked = []
    for path in PACKAGE.rglob("*.py"):
        banned = forms | {"nn.Linear"} | ({"Tensor", "torch.Tensor"} if path in tensors_banned else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                classes = {ast.unparse(part) for part in ast.walk(node.args[1])}
                asked += [f"{path.relative_to(PACKAGE)}:{node.lineno}"] if classes & banned else []
    assert asked == []
