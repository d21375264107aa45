"""Routed experts with LoRA adapters: ids that carry an adapter, their way to the shards, and a shard's sums."""

import numpy as np
import pytest
import torch
from configs import config
from hypothesis import given
from hypothesis import strategies as st
from lora_tools import write_adapter

from cluster.checkpoint.adapters import open_adapter
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import expert_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.config.lora import AdapterList
from cluster.errors import CheckpointError, ShardUnavailable
from cluster.experts.adapted_ids import adapted, experts_of, numbers_of, offset_of
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.experts.route import Route
from cluster.experts.shard import ExpertShard
from cluster.kernels.experts import experts_reference

H, I, E, K = 32, 16, 5, 3  # noqa: E741 an intermediate size
RAW = config(num_hidden_layers=1, num_experts=E, num_experts_per_tok=K)
NOBODY = frozenset()


@given(st.lists(st.tuples(st.integers(-1, 40), st.integers(-1, E - 1)), min_size=1))
def test_an_id_has_its_expert_and_its_adapter(pairs):
    numbers, experts = np.array(pairs).T
    offsets = torch.tensor([offset_of(number, E) for number in numbers])
    ids = adapted(torch.from_numpy(experts)[:, None], offsets).numpy()[:, 0]
    assert (experts_of(ids, E) == experts).all()
    assert (numbers_of(ids, E) == np.where(experts < 0, -1, numbers)).all()
    assert ((ids > E) == ((numbers >= 0) & (experts >= 0))).all()  # what knows no adapters knows none of these


@pytest.mark.parametrize("copied", [False, True])
def test_rows_with_adapters_go_to_the_shards_of_their_experts(copied):
    plan = plan_evenly([0], E, 2)
    if copied:
        plan = PlacementPlan(epoch=0, num_experts=E, slices=({0: (0, 1, 2, 3)}, {0: (3, 4)}))
    ids = np.array([[0, 4, -1], [2, 3, 1]])
    offsets = np.array([[offset_of(9, E)], [0]])
    plain, carrying = (
        Route(plan, 0, NOBODY, NOBODY).shards(one) for one in (ids, np.where(ids < 0, ids, ids + offsets))
    )
    assert (plain == carrying).all()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint, and two adapters of it: `all` changes each matrix of each expert, `one` the down of expert 2."""
    path, draw = tmp_path_factory.mktemp("experts"), torch.Generator().manual_seed(3)
    write_checkpoint(path / "model", RAW, seed=1)
    shapes = {name: shape for expert in range(E) for name, shape in expert_shapes(read(path).config, 0, expert).items()}
    pairs = {
        name.removesuffix(".weight"): (torch.randn(2, k, generator=draw), torch.randn(n, 2, generator=draw))
        for name, (n, k) in shapes.items()
    }
    write_adapter(path / "all", pairs, target_modules=r".*\.experts\..*")
    down = "model.layers.0.mlp.experts.2.down_proj"
    write_adapter(path / "one", {down: pairs[down]}, target_modules=r".*experts\.2\.down_proj", lora_alpha=1)
    return path


def read(path):
    return open_checkpoint(path / "model")


def lists(path, *names):
    found = AdapterList()
    for version, name in enumerate(names, start=1):
        found = found.loaded(name, str(path / name), float(version))
    return found


def merged(path, name):
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I] of the checkpoint plus an adapter's, "" for none."""
    reader, matrices = read(path), {}
    for expert in range(E):
        for full, shape in expert_shapes(reader.config, 0, expert).items():
            matrices[full] = torch.empty(shape)
    reader.load(matrices)
    if name:
        stored = open_adapter(path / name, reader.config, 8)
        for module, (a, b) in stored.read(list(stored.modules)).items():
            matrices[f"{module}.weight"] += b @ a
    gate, up, down = (
        [matrix for full, matrix in matrices.items() if kind in full] for kind in ("gate_proj", "up_proj", "down_proj")
    )
    return torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]), torch.stack(down)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_shard_gives_the_sums_of_merged_experts(directory, dtype, tolerance):
    """Of rows without an adapter, with one, and with the other, in one batch, some slots elsewhere; against the plain
    definition. Rows without one are the same to the last bit."""
    shard = ExpertShard(0, read(directory).config, dtype=dtype, device=torch.device("cpu"))
    shard.load(read(directory), {0: range(E)})
    draw = torch.Generator().manual_seed(4)
    num_rows = 40
    x = torch.randn(num_rows, H, generator=draw).to(dtype)
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(num_rows)])
    ids[::7, 1] = -1
    weights = torch.rand(num_rows, K, generator=draw)
    plain = shard.forward(0, x, ids, weights)
    shard.adapt(lists(directory, "all", "one"))
    numbers = torch.tensor([-1, 0, 1, 0]).repeat(10)
    out = shard.forward(0, x, adapted(ids, torch.tensor([offset_of(int(n), E) for n in numbers])), weights)
    for number, name in ((-1, ""), (0, "all"), (1, "one")):
        rows = numbers == number
        expected = experts_reference(x[rows].float(), ids[rows], weights[rows], *merged(directory, name))
        error = (out[rows].float() - expected).norm() / expected.norm()
        assert error < tolerance, name
    assert torch.equal(shard.forward(0, x, ids, weights), plain)
    if dtype is torch.bfloat16:  # in float32 torch rounds an expert's rows by their number
        assert torch.equal(out[numbers < 0], plain[numbers < 0])
    assert shard.expert_tokens.sum() == 3 * (ids >= 0).sum()


def test_a_shard_without_the_adapter_of_a_row_says_so(directory):
    """Never with the base in its stead: not before it is loaded, not while its part of an expert is missing."""
    shard = ExpertShard(0, read(directory).config, dtype=torch.float32, device=torch.device("cpu"))
    shard.load(read(directory), {0: (0, 1)})
    x, ids, weights = torch.ones(1, H), torch.tensor([[0, 1, -1]]), torch.ones(1, K)

    def ask(number):
        return shard.forward(0, x, adapted(ids, torch.tensor([offset_of(number, E)])), weights)

    for number in (0, 7):
        with pytest.raises(ShardUnavailable, match="does not hold the adapter"):
            ask(number)
    shard.adapt(lists(directory, "all"))
    assert not torch.equal(ask(0), shard.forward(0, x, ids, weights))
    with pytest.raises(ShardUnavailable, match="shard 0 does not hold adapter 7 yet"):
        ask(7)
    with pytest.raises(CheckpointError, match="is not a directory"):
        shard.adapt(lists(directory, "all", "nowhere"))
    ask(0)
    shard.adapt(AdapterList(version=9.0))
    assert shard.adapters.now.num_bytes == 0
    with pytest.raises(ShardUnavailable, match="does not hold the adapter"):
        ask(0)


def test_a_list_that_comes_late_changes_nothing(directory):
    shard = ExpertShard(0, read(directory).config, dtype=torch.float32, device=torch.device("cpu"))
    shard.load(read(directory), {0: (0, 2)})
    both = lists(directory, "all", "one")
    shard.adapt(both)
    num_bytes = shard.num_bytes
    shard.adapt(lists(directory, "all"))
    assert shard.num_bytes == num_bytes
    # Of `all`: 2 experts with A and B of rank 2 for gate, up and down, (H + I) numbers each; of `one`: one of these.
    assert shard.adapters.now.num_bytes == (2 * 3 + 1) * 2 * (H + I) * 4
    shard.load(read(directory), {0: (1,)})
    assert shard.adapters.now.num_bytes == 3 * 2 * (H + I) * 4
