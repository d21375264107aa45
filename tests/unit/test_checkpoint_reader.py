"""The reader against safetensors' own `load_file`, and every way in which a directory can be broken."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.checkpoint.generation import read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.made.drawn import SEED_KEY
from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import read_model_config
from cluster.errors import CheckpointError
from cluster.experts.shard import ExpertShard
from cluster.kernels.weights import packs
from cluster.model.registry import load_model
from cluster.types import SAMPLING_DEFAULTS

INDEX = "model.safetensors.index.json"
RAW: dict[str, Any] = {
    **A2_7B_CONFIG,
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "eos_token_id": 7,
}
EMBED, HEAD, GATE = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def pristine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("checkpoint") / "pristine"
    write_checkpoint(model_dir, RAW, seed=3, max_file_bytes=6000)
    return model_dir


@pytest.fixture
def model_dir(pristine_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(pristine_dir, tmp_path / "model"))


def load_everything(model_dir: Path) -> dict[str, Tensor]:
    return {n: t for path in model_dir.glob("*.safetensors") for n, t in load_file(path).items()}


def weight_map(model_dir: Path) -> dict[str, str]:
    return dict(json.loads((model_dir / INDEX).read_text())["weight_map"])


def write_index(model_dir: Path, mapping: dict[str, Any]) -> None:
    (model_dir / INDEX).write_text(json.dumps({"weight_map": mapping}))


def make_targets(reader: CheckpointReader, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {n: torch.full(s, torch.nan, dtype=dtype) for n, s in checkpoint_shapes(reader.config).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_load_copies_every_tensor_cast_to_its_destination(model_dir: Path, dtype: torch.dtype) -> None:
    reader = CheckpointReader(model_dir)
    reader.check_names()
    targets = make_targets(reader, dtype)
    expected = load_everything(model_dir)
    assert len(set(weight_map(model_dir).values())) > 2
    assert reader.load(targets) == sum(t.nbytes for t in expected.values())
    assert targets.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(targets[name], tensor.to(dtype)), name


@pytest.mark.parametrize("stored_as", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_every_dtype_on_disk_is_read_into_every_other(
    model_dir: Path, stored_as: torch.dtype, dtype: torch.dtype
) -> None:
    """Each number once rounded, from its own dtype to the other."""
    for path in model_dir.glob("*.safetensors"):
        save_file({name: tensor.to(stored_as) for name, tensor in load_file(path).items()}, path)
    reader, stored = CheckpointReader(model_dir), load_everything(model_dir)
    targets = make_targets(reader, dtype)
    reader.load(targets)
    assert all(tensor.dtype == stored_as for tensor in stored.values())
    assert all(torch.equal(target, stored[name].to(dtype)) for name, target in targets.items())


def test_load_fills_a_view_and_leaves_what_lies_around_it(model_dir: Path) -> None:
    """Rows 10 to 59 of the transposed buffer are the destination: a view that is not contiguous."""
    buffer = torch.zeros(16, 80)
    CheckpointReader(model_dir).load({EMBED: buffer.T[10:60]})
    assert torch.equal(buffer.T[10:60], load_everything(model_dir)[EMBED].float())
    assert not buffer[:, :10].any()
    assert not buffer[:, 60:].any()


def test_load_reports_each_tensors_bytes_on_disk(model_dir: Path) -> None:
    """[50, 16] and [3, 16] of bfloat16 are 1600 and 96 bytes, whatever the destination's dtype."""
    reported: list[int] = []
    targets = {EMBED: torch.empty(50, 16), GATE: torch.empty(3, 16)}
    assert CheckpointReader(model_dir).load(targets, reported.append) == 1696
    assert sorted(reported) == [96, 1600]


def test_load_touches_only_files_that_hold_a_wanted_tensor(model_dir: Path) -> None:
    expected = load_everything(model_dir)[GATE].float()
    wanted_file = weight_map(model_dir)[GATE]
    reader = CheckpointReader(model_dir)
    others = [path for path in model_dir.glob("*.safetensors") if path.name != wanted_file]
    assert others
    for path in others:
        path.write_bytes(b"")
    target = torch.empty(3, 16)
    CheckpointReader(model_dir).load({GATE: target})
    assert torch.equal(target, expected)
    with pytest.raises(CheckpointError, match=weight_map(model_dir)[EMBED]):
        reader.load({EMBED: torch.empty(50, 16)})


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    reader = CheckpointReader(str(tmp_path))
    reader.check_names()
    target = torch.empty(50, 16)
    reader.load({HEAD: target})
    assert torch.equal(target, load_everything(tmp_path)[HEAD].float())


def test_load_holds_at_most_one_tensor_beside_the_destinations(tmp_path: Path) -> None:
    """Four bfloat16 tensors of 32 MiB go into one float32 buffer of 64 MiB: a copy of the file would show as
    128 MiB more anonymous memory, a float32 copy of a tensor as 64, a tensor as it is on disk as 32."""
    mib = 1 << 20
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    ones = {f"t{i}": torch.ones(16 * mib, dtype=torch.bfloat16) for i in range(4)}
    save_file(ones, tmp_path / "model.safetensors")
    del ones
    reader = CheckpointReader(tmp_path)
    buffer = torch.zeros(16 * mib)
    with anonymous_memory() as samples:
        assert reader.load(dict.fromkeys(reader.names, buffer)) == 128 * mib
    assert (buffer == 1).all()
    assert len(samples) > 5
    assert max(samples) - samples[0] < 48 * mib


@pytest.mark.skipif(not packs(torch.bfloat16, torch.device("cpu")), reason="weights are not packed here")
def test_packing_a_slice_holds_at_most_one_product_beside_it(tmp_path: Path) -> None:
    """Eight experts of 48 MiB: gate and up together 32, down 16. An expert at a time would show as 48 beside them.

    A freed block of just below 32 MiB makes glibc put later ones on its heap, where a freed weight leaves a hole that
    the next one does not fit into: 16 MiB an expert, were each weight read into memory of its own.
    """
    mib = 1 << 20
    torch.empty(31 * mib, dtype=torch.uint8)
    raw = {
        **RAW, "hidden_size": 2048, "moe_intermediate_size": 4096, "num_experts": 8, "num_hidden_layers": 1,
        "shared_expert_intermediate_size": 16, "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_checkpoint(tmp_path, raw, seed=1)
    shard = ExpertShard(0, read_model_config(raw), dtype=torch.bfloat16, device=torch.device("cpu"))
    with anonymous_memory() as samples:
        shard.load(CheckpointReader(tmp_path), {0: range(8)})
    assert shard.num_bytes == 8 * 48 * mib
    assert len(samples) > 5
    assert max(samples) - samples[0] < (8 * 48 + 40) * mib


@pytest.mark.skipif(not packs(torch.bfloat16, torch.device("cpu")), reason="weights are not packed here")
def test_packing_a_dense_model_holds_at_most_its_largest_weight_beside_it(tmp_path: Path) -> None:
    """Embeddings and head are 64 MiB each; a layer has four matrices of 8 MiB and three of 16. The head's memory while
    it is packed is the most that may stand beside them. A first, small model imports torch's late parts."""
    mib = 1 << 20
    small, large = tmp_path / "small", tmp_path / "large"
    raw = {
        **RAW, "hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 16384, "num_hidden_layers": 2, "mlp_only_layers": [0, 1], "torch_dtype": "bfloat16",
        SEED_KEY: 1,
    }  # fmt: skip
    for folder, config in ((small, {**RAW, SEED_KEY: 1}), (large, raw)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    load_model(open_checkpoint(small), dtype=torch.bfloat16, device=torch.device("cpu"))
    reader = open_checkpoint(large)
    with anonymous_memory() as samples:
        model = load_model(reader, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.config.vocab_size == 16384
    whole = (2 * 64 + 2 * (4 * 8 + 3 * 16)) * mib
    assert len(samples) > 5
    # At least: some of it may lie in memory that the process held before.
    assert whole // 2 < max(samples) - samples[0] < whole + 72 * mib


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """This process's memory in bytes, up to a thousand times a second while the block runs."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            samples.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024)  # type: ignore[index]
            if done.wait(0.001):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_load_fills_destinations_on_cuda(model_dir: Path) -> None:
    target = torch.empty(50, 16, device="cuda")
    CheckpointReader(model_dir).load({EMBED: target})
    assert torch.equal(target.cpu(), load_everything(model_dir)[EMBED].float())


def test_check_names_tells_missing_and_superfluous_tensors(model_dir: Path) -> None:
    """The gate and the three matrices of one expert are gone: three are named, the fourth is counted."""
    mapping = weight_map(model_dir)
    gone = [name for name in mapping if name.startswith("model.layers.1.mlp.experts.2") or name == GATE]
    for name in gone:
        del mapping[name]
    mapping["model.layers.2.mlp.gate.weight"] = mapping[EMBED]
    write_index(model_dir, mapping)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(model_dir).check_names()
    message = str(caught.value)
    assert str(model_dir) in message
    assert f"{GATE}, " in message
    assert "and 1 more are missing" in message
    assert "model.layers.2.mlp.gate.weight is not expected" in message
    assert "\n" not in message


def test_check_names_lets_a_tied_head_pass(model_dir: Path) -> None:
    mapping = weight_map(model_dir)
    (model_dir / "config.json").write_text(json.dumps({**RAW, "tie_word_embeddings": True}))
    CheckpointReader(model_dir).check_names()
    del mapping[HEAD]
    write_index(model_dir, mapping)
    CheckpointReader(model_dir).check_names()
    (model_dir / "config.json").write_text(json.dumps(RAW))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        CheckpointReader(model_dir).check_names()


def _map_embed_to(value: Any) -> Callable[[Path], None]:
    return lambda d: write_index(d, {**weight_map(d), EMBED: value})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "is not a directory"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is not UTF-8"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json holds a JSON list"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda d: (d / INDEX).write_text("null"), f"{INDEX} holds a JSON NoneType"),
        (lambda d: (d / INDEX).write_text("{}"), "weight_map is missing or empty"),
        (_map_embed_to(3), f"weight_map gives 3 for '{EMBED}'"),
        (_map_embed_to("../secret.safetensors"), "weight_map gives '../secret.safetensors'"),
        (_map_embed_to(".."), "names .. which is not there"),
        (_map_embed_to("gone.safetensors"), "names gone.safetensors which is not there"),
        (lambda d: (d / "model.safetensors").touch(), "model.safetensors is not a complete"),
    ],
)
def test_a_broken_directory_is_refused_in_one_line(
    model_dir: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(model_dir)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(model_dir)
    assert expected in str(caught.value)
    assert str(model_dir) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 64 + data[72:],
    ],
    ids=["a byte short", "cut in the header", "empty", "long header", "garbage header"],
)
def test_a_damaged_weights_file_is_refused_by_name(model_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    path = model_dir / weight_map(model_dir)[EMBED]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is not a complete safetensors file") as caught:
        CheckpointReader(model_dir).load({EMBED: torch.empty(50, 16)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misshapen_tensor_is_refused_with_both_shapes(model_dir: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(model_dir).load({EMBED: torch.empty(16, 50)})
    assert f"{EMBED} has shape [50, 16], config.json implies [16, 50]" in str(caught.value)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_tensor_of_another_dtype_is_refused(model_dir: Path, dtype: torch.dtype, name: str) -> None:
    save_file({EMBED: torch.zeros(50, 16, dtype=dtype)}, model_dir / weight_map(model_dir)[EMBED])
    with pytest.raises(CheckpointError, match=f"{EMBED} has dtype {name}, F64, F32, BF16, F16 are served"):
        CheckpointReader(model_dir).load({EMBED: torch.empty(50, 16)})


def test_a_tensor_that_is_not_in_the_file_of_its_index_is_named(model_dir: Path) -> None:
    mapping = weight_map(model_dir)
    assert mapping[EMBED] != mapping[HEAD]
    write_index(model_dir, {**mapping, EMBED: mapping[HEAD]})
    with pytest.raises(CheckpointError, match=rf"{mapping[HEAD]}: {EMBED} is not in this file"):
        CheckpointReader(model_dir).load({EMBED: torch.empty(50, 16), HEAD: torch.empty(50, 16)})


def test_a_tensor_that_no_file_has_is_named(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not in the checkpoint"):
        CheckpointReader(model_dir).load({"nothing": torch.empty(1)})


def write_generation(model_dir: Path, **values: object) -> Path:
    (model_dir / "generation_config.json").write_text(json.dumps(values))
    return model_dir


def test_sampling_defaults_come_from_the_checkpoint_and_then_from_vllm(tmp_path: Path) -> None:
    write_generation(
        tmp_path,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        repetition_penalty=1.05,
        max_new_tokens=9,
        top_p=None,
    )
    params = read_sampling_defaults(tmp_path)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.7, 20, 1.05)
    assert (params.top_p, params.min_p, params.presence_penalty) == (1.0, 0.0, 0.0)
    assert params.max_tokens == 9


def test_a_checkpoint_without_generation_config_has_vllms_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SAMPLING_DEFAULTS


def test_do_sample_false_means_greedy_whatever_the_temperature(tmp_path: Path) -> None:
    params = read_sampling_defaults(write_generation(tmp_path, do_sample=False, temperature=0.7, top_k=20))
    assert params.greedy
    assert params.top_k == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", 2.5),
        ("top_p", 0),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
    ],
)
def test_a_bad_sampling_default_is_refused_by_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    write_generation(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is "):
        read_sampling_defaults(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([9, 7, 9, 2], (9, 7, 2)), (3, (3, 7)), (None, (7,)), ([], (7,)), (0, (0, 7))],
)
def test_eos_ids_are_the_generation_configs_and_then_the_configs(
    model_dir: Path, given: object, expected: tuple[int, ...]
) -> None:
    write_generation(model_dir, eos_token_id=given)
    assert read_eos_token_ids(model_dir, CheckpointReader(model_dir).config) == expected


@pytest.mark.parametrize("given", ["2", [1, None], 50, -1, True, [[1]]])
def test_an_eos_id_outside_the_vocabulary_is_refused(model_dir: Path, given: object) -> None:
    write_generation(model_dir, eos_token_id=given)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id has "):
        read_eos_token_ids(model_dir, CheckpointReader(model_dir).config)
