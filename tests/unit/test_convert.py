"""`convert` writes any checkpoint that is read in the published layout, whole or not at all."""

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import NEW_STYLE, config, dense
from safetensors.torch import load_file, safe_open, save_file
from test_checkpoint_layouts import EXPERTS, PREFIXES, fuse
from test_checkpoint_reader import anonymous_memory
from torch import Tensor

from cluster import cli
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import EMBEDDING, HEAD
from cluster.checkpoint.pickled import PICKLES
from cluster.checkpoint.reader import CheckpointReader
from cluster.checkpoint.weights import LocalFiles
from cluster.checkpoint.writing import folder, weights
from cluster.checkpoint.writing.convert import convert
from cluster.checkpoint.writing.published import published_config
from cluster.errors import CheckpointError, ClusterError, SetupError

RAW = config(num_experts=5, num_experts_per_tok=2, num_hidden_layers=2)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", RAW, seed=4)
    return tmp_path / "in"


def tensors(model_dir: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(model_dir.glob("*.safetensors")) for k, v in load_file(path).items()}


def rewrite(source: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> dict[str, Tensor]:
    """Changes stored tensors and the config; returns the tensors as they were."""
    before = tensors(source)
    after = dict(before)
    change(after)
    save_file(after, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(RAW | settings))
    return before


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def contents(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()}


def test_fused_experts_under_long_names_come_out_as_published(source: Path, tmp_path: Path) -> None:
    """Layer 1 fused, all names with PEFT's words, an extra buffer: the tensors are those from before all that."""

    def wrap(stored: dict[str, Tensor]) -> None:
        fuse(stored)
        renamed = {PREFIXES["PEFT, merged"](name): tensor for name, tensor in stored.items()}
        stored.clear()
        stored.update(renamed | {"base_model.model.model.rotary_emb.inv_freq": torch.ones(4)})

    before = rewrite(source, wrap)
    convert(source, tmp_path / "out", max_file_bytes=20_000)
    assert same(tensors(tmp_path / "out"), before)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert list(index["weight_map"])[:2] == [EMBEDDING, "model.layers.0.input_layernorm.weight"]
    assert f"{EXPERTS}.4.down_proj.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert all(len(file) == 1 or sum(t.nbytes for t in file.values()) <= 20_000 for file in files)


def test_what_is_converted_again_is_the_same_to_the_byte(source: Path, tmp_path: Path) -> None:
    rewrite(source, fuse, **NEW_STYLE)
    convert(source, tmp_path / "once", dtype="bfloat16", max_file_bytes=30_000)
    convert(tmp_path / "once", tmp_path / "twice", max_file_bytes=30_000)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    assert len(contents(tmp_path / "once")) > 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_those_that_torch_rounds_to(source: Path, tmp_path: Path, dtype: str) -> None:
    before = rewrite(
        source, lambda stored: stored.update({n: t.double() for n, t in stored.items()}), torch_dtype="float64"
    )
    written = convert(source, tmp_path / "out", dtype=dtype)
    target = getattr(torch, dtype)
    assert same(tensors(tmp_path / "out"), {name: tensor.to(target) for name, tensor in before.items()})
    assert written.num_bytes == sum(tensor.numel() * target.itemsize for tensor in before.values())
    assert CheckpointReader(tmp_path / "out").config.dtype == dtype


def test_the_headers_are_those_of_safetensors(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_a_number_beyond_float16_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    rewrite(source, lambda stored: stored[HEAD].fill_(70000.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has numbers that float16 does not have"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings_is_dropped_where_it_is_the_same(
    source: Path, tmp_path: Path, equal: bool
) -> None:
    rewrite(
        source,
        lambda stored: stored.update({HEAD: stored[EMBEDDING].clone()} if equal else {}),
        tie_word_embeddings=True,
    )
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is equal
    assert (HEAD in tensors(tmp_path / "out")) is not equal


def test_drawn_weights_are_written_out(source: Path, tmp_path: Path) -> None:
    """A bench's config draws its weights: the copy holds them, and asks for no drawing any more."""
    (source / "model.safetensors").unlink()
    (source / "config.json").write_text(json.dumps(RAW | {"moe_cluster_random_weights": 3}))
    convert(source, tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").check_tensors() is None
    assert 0.01 < float(tensors(tmp_path / "out")[HEAD].std()) < 0.03


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"rope_theta": 5.0}, {"rope_theta": 5.0, "torch_dtype": "bfloat16"}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_theta": 7.0, "torch_dtype": "bfloat16"},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0}, "x": None},
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "rope_theta": 7.0,
                "torch_dtype": "bfloat16",
                "x": None,
            },
        ),
    ],
)
def test_a_config_gets_the_keys_of_released_ones(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = published_config(given, "bfloat16")
    assert made == expected
    assert published_config(made, "bfloat16") == made


def test_tokenizer_and_defaults_come_along(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "in", model_type="qwen2")
    (tmp_path / "in" / "LICENSE").write_text("free")
    (tmp_path / "in" / "optimizer.pt").write_text("none of a model's")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    before, after = contents(tmp_path / "in"), contents(tmp_path / "out")
    assert set(before) - set(after) == {"optimizer.pt"}
    assert set(after) - set(before) == {"vocab.json", "merges.txt"}
    copied = [name for name in set(after) & set(before) if not name.startswith(("config", "model"))]
    assert all(after[name] == before[name] for name in copied)


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocabulary"])
def test_the_tokenizer_comes_in_both_formats_and_transformers_reads_the_same_from_either(
    tmp_path: Path, kept: str
) -> None:
    from transformers import AutoTokenizer

    write_demo_checkpoint(tmp_path / "in", model_type="qwen2")
    convert(tmp_path / "in", tmp_path / "both")
    for name in ["tokenizer.json"] if kept == "vocabulary" else ["vocab.json", "merges.txt"]:
        (tmp_path / "both" / name).unlink()
    convert(tmp_path / "both", tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(tmp_path / "in")
    text = "Grüße, 你好!  123\n <|im_start|>user\nhi<|im_end|>"
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= contents(tmp_path / "out").keys()
    for unread in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        shutil.copytree(tmp_path / "out", tmp_path / unread[0])
        for name in unread:
            (tmp_path / unread[0] / name).unlink()
        assert AutoTokenizer.from_pretrained(tmp_path / unread[0])(text) == expected(text)


def test_a_tokenizer_that_cannot_be_read_is_copied_as_it_is(source: Path, tmp_path: Path, caplog: Any) -> None:
    (source / "tokenizer.json").write_text('{"decoder": {"type": "Metaspace"}}')
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "the tokenizer is copied as it is" in caplog.text


# Pickles.


@pytest.mark.parametrize("form", ["one file", "parts", "a trainer's .pt", "torch before 1.6"])
def test_pickled_weights_are_read_when_asked_for(source: Path, tmp_path: Path, form: str) -> None:
    before = tensors(source)
    (source / "model.safetensors").unlink()
    if form == "one file":
        torch.save(before, source / "pytorch_model.bin")
        torch.save({}, source / "optimizer.pt")
    elif form == "torch before 1.6":
        torch.save(before, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "parts":
        names = sorted(before)
        for i in range(2):
            torch.save({name: before[name] for name in names[i::2]}, source / f"pytorch_model-{i}.bin")
        weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in before.items()}}, source / "last.pt")
    with pytest.raises(CheckpointError, match="moe-cluster convert --from-pickle"):
        convert(source, tmp_path / "out")
    assert cli.main(["convert", "--from-pickle", str(source), str(tmp_path / "out")]) == 0
    assert same(tensors(tmp_path / "out"), before)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_program_in_a_pickle_is_not_run(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "b": Harmful(tmp_path / "run")}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        convert(source, tmp_path / "out", from_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", pickle.dumps([1, 2], protocol=2), b"\x80\x02}q\x00."])
def test_a_broken_pickle_is_refused_in_one_line(source: Path, tmp_path: Path, content: bytes) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", from_pickle=True)
    assert "\n" not in str(caught.value)
    assert "pytorch_model.bin" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_any_damage_is_read_or_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    stored = {"a.weight": torch.ones(4, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    torch.save(stored, tmp_path / "whole", _use_new_zipfile_serialization=zipped)
    whole, rng, messages = (tmp_path / "whole").read_bytes(), random.Random(7), []
    for _ in range(300):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        damaged[at : at + rng.choice([1, 4, len(whole)])] = rng.randbytes(rng.randrange(4))
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        try:
            PICKLES.locate(LocalFiles(tmp_path))
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not [message for message in messages if "\n" in message]


def test_pickles_that_are_not_there_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="and there is none"):
        convert(source, tmp_path / "out", from_pickle=True)


# Interrupted, full, refused.


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_run_that_fails_leaves_the_folder_as_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, fault: BaseException
) -> None:
    out = tmp_path / "deep" / "out"
    if existed:
        out.mkdir(parents=True)
    calls = iter([None, fault])

    def fsync(number: int) -> None:
        if error := next(calls):
            raise error

    monkeypatch.setattr(folder.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else ClusterError) as caught:
        convert(source, out, max_file_bytes=20_000)
    if isinstance(fault, OSError):
        assert str(caught.value).endswith("No space left on device: make room, or give a folder on another disk")
        assert not isinstance(caught.value, SetupError)
    assert out.exists() is existed
    assert (tmp_path / "deep").exists() is existed
    assert not existed or not list(out.iterdir())


def test_a_killed_run_leaves_no_model_and_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process cleans nothing up: all but the last file's bytes lie there."""
    monkeypatch.setattr(folder.NewFolder, "_remove", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt_at_the_end)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.ASIDE]
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        CheckpointReader(tmp_path / "out")
    with pytest.raises(SetupError, match="of a run that was killed or still goes on: remove the folder"):
        convert(source, tmp_path / "out")


def interrupt_at_the_end(done: int, total: int) -> None:
    if done == total:
        raise KeyboardInterrupt


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SetupError, match="its disk has 1,000 free"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_refused(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    (tmp_path / "file").write_text("")
    for out, reason in (
        (source, "is not empty (config.json is in it)"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "out", "Not a directory"),
        (Path("/proc/none/out"), "cannot be written"),
    ):
        with pytest.raises(SetupError) as caught:
            convert(source, out)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    assert contents(source) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtype", "int8"], "dtype is 'int8', one of auto, float32, bfloat16, float16 is needed"),
        (["--max-shard-size", "0"], "the largest file is to have 0 bytes"),
        (["--max-shard-size", "five"], "'five' is no size"),
    ],
)
def test_wrong_options_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["nothing", "no weights", "half a file"])
def test_sources_that_are_no_model_are_refused(source: Path, tmp_path: Path, what: str) -> None:
    if what == "nothing":
        source = tmp_path / "none"
    elif what == "no weights":
        (source / "model.safetensors").unlink()
    else:
        raw = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_bounded_by_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 MiB are written, in matrices of 2 MiB: memory grows by a few of them (and what is loaded once), not by all."""
    monkeypatch.setattr(weights, "BATCH_BYTES", 1 << 20)
    raw = dense(num_hidden_layers=8, hidden_size=512, intermediate_size=2048, num_attention_heads=4, vocab_size=64)
    write_checkpoint(tmp_path / "in", raw, seed=0)
    with anonymous_memory() as samples:
        convert(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    assert max(samples) - samples[0] < 20 << 20
