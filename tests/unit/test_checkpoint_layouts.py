"""Checkpoints as people have them: fused experts, files without an index, tied heads, tensors too many or too few."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import BASE, config
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import EMBEDDING, HEAD, checkpoint_shapes
from cluster.checkpoint.reader import CheckpointReader
from cluster.errors import CheckpointError

INDEX = "model.safetensors.index.json"
RAW = config(num_experts=5, num_experts_per_tok=2, num_hidden_layers=2)
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", RAW, seed=4)
    return tmp_path / "model"


def tensors(model_dir: Path) -> dict[str, Tensor]:
    return load_file(model_dir / "model.safetensors")


def rewrite(model_dir: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> dict[str, Tensor]:
    """Changes the stored tensors, and keys of the config; returns the tensors as they were."""
    before = tensors(model_dir)
    after = dict(before)
    change(after)
    save_file(after, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(RAW | settings))
    return before


def fuse(stored: dict[str, Tensor]) -> None:
    """Layer 1's experts as transformers 5 stores them: gate above up in [E, 2I, H], down in [E, H, I]."""
    parts = {
        name: [stored.pop(f"{EXPERTS}.{e}.{name}_proj.weight") for e in range(5)] for name in ("gate", "up", "down")
    }
    pairs = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
    stored[f"{EXPERTS}.gate_up_proj"] = torch.stack(pairs)
    stored[f"{EXPERTS}.down_proj"] = torch.stack(parts["down"])


def read_everything(model_dir: Path, names: list[str] | None = None) -> tuple[dict[str, Tensor], list[int]]:
    reader = CheckpointReader(model_dir)
    reader.check_tensors()
    targets = {n: torch.zeros(s) for n, s in checkpoint_shapes(reader.config).items() if names is None or n in names}
    reported: list[int] = []
    assert reader.load(targets, reported.append) == sum(reported)
    return targets, reported


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_fused_experts_are_found_under_their_own_names(model_dir: Path) -> None:
    """One layer of two is fused, so both layouts are read from one checkpoint."""
    before = rewrite(model_dir, fuse)
    read, _ = read_everything(model_dir)
    assert same(read, before)


@pytest.mark.parametrize("inner", [16, 12, 32], ids=["2I = H", "nothing is square", "I = H"])
def test_fused_experts_with_inputs_before_outputs_are_found(tmp_path: Path, inner: int) -> None:
    """[E, H, 2I] and [E, I, H]. Where one tensor is square, the other tells."""
    model_dir = tmp_path / "model"
    write_checkpoint(model_dir, RAW | {"moe_intermediate_size": inner}, seed=4)

    def turn(stored: dict[str, Tensor]) -> None:
        fuse(stored)
        stored.update(
            {f"{EXPERTS}.{n}": stored[f"{EXPERTS}.{n}"].mT.contiguous() for n in ("gate_up_proj", "down_proj")}
        )

    before = rewrite(model_dir, turn, moe_intermediate_size=inner)
    read, _ = read_everything(model_dir)
    assert same(read, before)


PREFIXES = {
    "a decoder without its head": lambda name: name.removeprefix("model."),
    "PEFT, merged": lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "FSDP with activation checkpointing": lambda name: name.replace(
        "layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "Lightning": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("name_of", PREFIXES.values(), ids=PREFIXES)
def test_names_with_a_wrappers_words_are_found(model_dir: Path, name_of: Callable[[str], str]) -> None:
    def rename(stored: dict[str, Tensor]) -> None:
        renamed = {name_of(name): tensor for name, tensor in stored.items()}
        stored.clear()
        stored.update(renamed)

    before = rewrite(model_dir, rename)
    assert not set(tensors(model_dir)) >= set(before)
    read, _ = read_everything(model_dir)
    assert same(read, before)


def test_an_adapter_beside_its_base_is_refused_with_what_to_do(model_dir: Path) -> None:
    def wrap(stored: dict[str, Tensor]) -> None:
        renamed = {PREFIXES["PEFT, merged"](name): tensor for name, tensor in stored.items()}
        stored.clear()
        stored.update(renamed)
        stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 32)

    rewrite(model_dir, wrap)
    assert "q_proj.lora_A.default.weight is not expected: an adapter lies beside its base: merge it" in refusal(
        model_dir
    )


def test_names_stay_where_two_would_be_one(model_dir: Path) -> None:
    """A base and its copy in one file: which of them counts is not known."""
    rewrite(model_dir, lambda stored: stored.update({f"module.{HEAD}": torch.ones(211, 32)}))
    assert f"module.{HEAD} is not expected" in refusal(model_dir)


def test_of_fused_experts_only_the_wanted_part_is_read(model_dir: Path) -> None:
    """gate, up [16, 32] and down [32, 16] of float32 are 2048 bytes each, of the fused 20,480 and 10,240."""
    before = rewrite(model_dir, fuse)
    wanted = [f"{EXPERTS}.3.{name}_proj.weight" for name in ("gate", "up", "down")]
    read, reported = read_everything(model_dir, wanted)
    assert same(read, {name: before[name] for name in wanted})
    assert reported == [2048] * 3


def test_only_a_slice_of_a_fused_tensor_comes_into_memory(tmp_path: Path) -> None:
    """Of 8 experts of 8 MiB in one tensor, one is read: the memory that is not the file's grows by less than two."""
    from test_checkpoint_reader import anonymous_memory

    raw = config(
        num_experts=8, num_experts_per_tok=2, num_hidden_layers=1, hidden_size=1024, moe_intermediate_size=1024
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 2048, 1024)}, tmp_path / "model.safetensors")
    reader, target = CheckpointReader(tmp_path), torch.zeros(1024, 1024)
    with anonymous_memory() as samples:
        for _ in range(20):
            reader.load({"model.layers.0.mlp.experts.5.up_proj.weight": target})
    assert (target == 1).all()
    assert max(samples) - samples[0] < 16 << 20


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.update({f"{EXPERTS}.0.gate_proj.weight": torch.zeros(16, 32)}),
            "experts.0.gate_proj.weight is not",
        ),
        (lambda t: t.update({f"{EXPERTS}.gate_up_proj": t[f"{EXPERTS}.gate_up_proj"][:4]}), "has shape [4, 32, 32]"),
        (
            lambda t: t.update({f"{EXPERTS}.down_proj": t[f"{EXPERTS}.down_proj"][:, :8].contiguous()}),
            "shape [5, 8, 16]",
        ),
        (lambda t: t.pop(f"{EXPERTS}.down_proj"), "experts.0.down_proj.weight"),
    ],
    ids=["also one by one", "an expert short", "narrower", "the half is missing"],
)
def test_fused_experts_that_do_not_fit_are_refused(
    model_dir: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    rewrite(model_dir, lambda stored: (fuse(stored), change(stored)))
    assert named in refusal(model_dir)


def refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(model_dir).check_tensors()
    assert "\n" not in str(caught.value)
    assert str(model_dir) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}), {}, "layers.2.input_layernorm"),
        (
            lambda t: t.update({f"{EXPERTS}.5.up_proj.weight": torch.ones(16, 32)}),
            {},
            "experts.5.up_proj.weight is not",
        ),
        (lambda t: None, {"num_hidden_layers": 1}, "model.layers.1."),
        (lambda t: None, {"num_experts": 4}, "experts.4."),
        (lambda t: None, {"qkv_bias": False}, "qkv_bias is false there: make it true"),
        (lambda t: t.update({"lm_head.bias": torch.ones(211)}), {}, "lm_head.bias is not expected"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}),
            {},
            "o_proj.bias is not expected",
        ),
        (lambda t: t.update({"v_head.summary.weight": torch.ones(1, 32)}), {}, "v_head.summary.weight is not expected"),
        (lambda t: t.update({"evil\nname": torch.ones(1)}), {}, "'evil\\nname' is not expected"),
        (lambda t: t.pop("model.layers.1.mlp.shared_expert_gate.weight"), {}, "shared_expert_gate.weight is missing"),
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), {}, "k_proj.bias is missing"),
        (lambda t: None, {"mlp_only_layers": [1]}, "model.layers.1.mlp.gate_proj.weight"),
        (lambda t: t.update({HEAD: t[HEAD][:200]}), {}, "lm_head.weight has shape [200, 32]"),
        (lambda t: None, {"vocab_size": 10**9}, "has shape [211, 32], config.json implies [1000000000, 32]"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.int8)}), {}, "embed_tokens.weight has dtype I8"),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_kind_is_named(
    model_dir: Path, change: Callable[[dict[str, Tensor]], Any], settings: dict[str, Any], named: str
) -> None:
    rewrite(model_dir, change, **settings)
    assert named in refusal(model_dir)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.embeddings.position_ids",
    ],
)
def test_what_follows_from_the_config_is_let_lie_and_named(
    model_dir: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(model_dir, lambda stored: stored.update({name: torch.ones(4)}))
    with caplog.at_level(logging.WARNING):
        CheckpointReader(model_dir).check_tensors()
    assert f"{name} is not read" in caplog.text


def test_a_file_that_is_not_read_is_named(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One file goes before numbered ones, as in transformers: what lies beside it may be older, or newer."""
    save_file(tensors(model_dir), model_dir / "model-00001-of-00001.safetensors")
    with caplog.at_level(logging.WARNING):
        CheckpointReader(model_dir).check_tensors()
    assert "model-00001-of-00001.safetensors is not read" in caplog.text


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq.weight", "x.model.position_ids", "inv_freq"])
def test_only_whole_names_are_harmless(model_dir: Path, name: str) -> None:
    rewrite(model_dir, lambda stored: stored.update({name: torch.ones(4)}))
    assert f"{name} is not expected" in refusal(model_dir)


def test_a_head_that_is_stored_beside_tied_embeddings_is_the_head(model_dir: Path) -> None:
    """Both are read, whether they differ or not: transformers ties only where they do not."""
    before = rewrite(model_dir, lambda stored: None, tie_word_embeddings=True)
    reader = CheckpointReader(model_dir)
    assert not reader.config.tie_word_embeddings
    assert not torch.equal(before[HEAD], before[EMBEDDING])
    read, _ = read_everything(model_dir)
    assert same(read, before)


@pytest.mark.parametrize("stored_name", [HEAD, EMBEDDING])
def test_tied_embeddings_lie_under_either_name(model_dir: Path, stored_name: str) -> None:
    other = {HEAD: EMBEDDING, EMBEDDING: HEAD}[stored_name]
    before = rewrite(model_dir, lambda stored: stored.pop(other), tie_word_embeddings=True)
    assert CheckpointReader(model_dir).config.tie_word_embeddings
    read, _ = read_everything(model_dir)
    assert torch.equal(read[EMBEDDING], before[stored_name])
    assert HEAD not in read


def test_tied_embeddings_that_are_not_stored_are_missing(model_dir: Path) -> None:
    rewrite(model_dir, lambda stored: (stored.pop(HEAD), stored.pop(EMBEDDING)), tie_word_embeddings=True)
    assert f"{EMBEDDING} is missing" in refusal(model_dir)


def split(model_dir: Path, *, index: bool = False) -> list[Path]:
    """The one file as three, numbered as published."""
    stored = tensors(model_dir)
    (model_dir / "model.safetensors").unlink()
    paths = [model_dir / f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    names = sorted(stored)
    parts = [names[i::3] for i in range(3)]
    for path, part in zip(paths, parts, strict=True):
        save_file({name: stored[name] for name in part}, path)
    if index:
        mapping = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
        (model_dir / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return paths


def test_several_files_need_no_index(model_dir: Path) -> None:
    before = tensors(model_dir)
    split(model_dir)
    read, _ = read_everything(model_dir)
    assert same(read, before)


def test_a_numbered_file_that_is_missing_is_named(model_dir: Path) -> None:
    split(model_dir)[1].unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(model_dir)


@pytest.mark.parametrize("index", [False, True])
def test_a_tensor_in_two_files_is_named_with_both(model_dir: Path, index: bool) -> None:
    first, _, last = split(model_dir, index=index)
    twice = next(iter(load_file(first)))
    save_file(load_file(last) | {twice: torch.zeros(1)}, last)
    message = refusal(model_dir)
    assert twice in message
    assert first.name in message
    assert last.name in message


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda mapping, names: mapping.pop(names[0]), "is missing"),
        (lambda mapping, names: mapping.update({names[0]: mapping[names[-1]]}), "is not in this file, but"),
        (lambda mapping, names: mapping.update({"nothing": mapping[names[1]]}), "nothing is not expected"),
        (lambda mapping, names: mapping.update({names[0]: "x" * 300}), "which is not there"),
        (lambda mapping, names: mapping.update({names[0]: "a\0b"}), "which is not there"),
        (lambda mapping, names: mapping.update({names[0]: {"a": 1}}), "weight_map gives {'a': 1}"),
    ],
)
def test_an_index_that_is_wrong_is_refused(model_dir: Path, damage: Callable[[Any, Any], Any], named: str) -> None:
    split(model_dir, index=True)
    raw = json.loads((model_dir / INDEX).read_text())
    damage(raw["weight_map"], list(raw["weight_map"]))
    (model_dir / INDEX).write_text(json.dumps(raw))
    assert named in refusal(model_dir)


def test_a_tensor_of_which_the_index_knows_nothing_is_named(model_dir: Path) -> None:
    first, *_ = split(model_dir, index=True)
    save_file(load_file(first) | {"more": torch.zeros(1)}, first)
    assert f"{first.name}: more is in this file and not in" in refusal(model_dir)


@pytest.mark.parametrize("names", [["model.safetensors"], ["a.safetensors", "b.safetensors"]])
def test_files_without_any_tensor_are_refused(model_dir: Path, names: list[str]) -> None:
    (model_dir / "model.safetensors").unlink()
    for name in names:
        save_file({}, model_dir / name)
    assert "no tensor is in its safetensors files: download them again" in refusal(model_dir)


@pytest.mark.parametrize(
    ("file_name", "named"),
    [
        ("pytorch_model.bin", "pickled (pytorch_model.bin), a format that can hold any program: `moe-cluster convert"),
        ("pytorch_model-00001-of-00002.bin", "weights are pickled (pytorch_model-00001-of-00002.bin)"),
        ("pytorch_model.bin.index.json", "weights are pickled (pytorch_model.bin.index.json)"),
        ("model.pt", "weights are pickled (model.pt)"),
        ("ggml-model.gguf", "not ggml-model.gguf: convert it"),
        ("adapter_config.json", "holds an adapter, not a whole model: merge it"),
        (None, "only safetensors weights are read"),
    ],
)
def test_weights_of_another_format_are_refused_with_what_to_do(
    model_dir: Path, file_name: str | None, named: str
) -> None:
    (model_dir / "model.safetensors").unlink()
    if file_name is not None:
        (model_dir / file_name).write_bytes(b"weights")
    assert named in refusal(model_dir)


@pytest.mark.parametrize("file_name", ["model.safetensors", "config.json", "model-00002-of-00003.safetensors", INDEX])
def test_a_pointer_of_git_lfs_is_refused_before_anything_is_loaded(model_dir: Path, file_name: str) -> None:
    if file_name not in ("model.safetensors", "config.json"):
        split(model_dir, index=True)
    (model_dir / file_name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert f"{file_name} is a pointer of Git LFS" in refusal(model_dir)
    assert "git lfs pull" in refusal(model_dir)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16,), "bfloat16"),
        ((torch.float16,), "float16"),
        ((torch.bfloat16, torch.float32), "float32"),
        ((torch.bfloat16, torch.float16), "float32"),
        ((torch.float64,), "float64"),
    ],
)
def test_a_config_without_a_dtype_has_its_tensors(
    model_dir: Path, dtypes: tuple[torch.dtype, ...], expected: str
) -> None:
    """The smallest dtype that holds them all, as vLLM says; transformers takes the first one's."""
    rewrite(
        model_dir,
        lambda stored: stored.update({n: t.to(dtypes[i % len(dtypes)]) for i, (n, t) in enumerate(stored.items())}),
        torch_dtype=None,
    )
    assert CheckpointReader(model_dir).config.dtype == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [("half", "float16"), ("float", "float32"), ("double", "float64"), ("torch.bfloat16", "bfloat16")],
)
def test_torchs_other_names_of_dtypes_are_known(given: str, expected: str, model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps(BASE | RAW | {"torch_dtype": given}))
    assert CheckpointReader(model_dir).config.dtype == expected


def test_float64_is_converted_while_it_is_read(model_dir: Path) -> None:
    before = rewrite(
        model_dir, lambda stored: stored.update({n: t.double() for n, t in stored.items()}), torch_dtype="float64"
    )
    read, reported = read_everything(model_dir)
    assert same(read, before)
    assert sum(reported) == 8 * sum(tensor.numel() for tensor in before.values())
