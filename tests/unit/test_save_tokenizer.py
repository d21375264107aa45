"""The tokenizer as it is written: transformers reads the same ids, texts and templates from either of its formats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import says, write_tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

from cluster.checkpoint.save_tokenizer import save_tokenizer
from cluster.errors import CheckpointError
from cluster.serving.text.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello, world! 123  \n\n x",
    "e\u0301\u1e9b\u0323 你好 🙂👋🏽",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'LL ''s",
]


@pytest.fixture
def source(demo_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))


def keep_only(out: Path, *names: str) -> None:
    for path in out.iterdir():
        if path.name not in (*names, "config.json"):
            path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize(
    "kept",
    [
        ("tokenizer.json", "tokenizer_config.json"),
        ("vocab.json", "merges.txt", "tokenizer_config.json"),
        ("tokenizer.json",),
    ],
    ids=["tokenizer.json", "vocabulary", "tokenizer.json alone"],
)
def test_transformers_reads_the_same_ids_from_what_is_written(source: Path, tmp_path: Path, kept: Any) -> None:
    out = tmp_path / "out"
    oracle = AutoTokenizer.from_pretrained(source)
    written = Tokenizer(source).save(out)
    assert {p.relative_to(out).as_posix() for p in written} == {
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
    }  # fmt: skip
    shutil.copy(source / "config.json", out)
    keep_only(out, *kept)
    theirs, ours = Qwen2Tokenizer.from_pretrained(out), Tokenizer(out)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(max_size=40) | st.lists(st.sampled_from(TEXTS + SPECIALS + [" ", "é"])).map("".join))
    def same_ids(text: str) -> None:
        expected = oracle(text)["input_ids"]
        assert theirs(text)["input_ids"] == expected
        assert ours.encode(text) == expected
        assert theirs.decode(expected, skip_special_tokens=True) == oracle.decode(expected, skip_special_tokens=True)

    same_ids()
    assert len(theirs) == len(oracle)
    if "tokenizer_config.json" in kept:
        assert theirs.special_tokens_map == oracle.special_tokens_map
        assert theirs.all_special_ids == oracle.all_special_ids


def test_the_vocabulary_is_as_transformers_saves_it(source: Path, tmp_path: Path) -> None:
    """The files of `Qwen2Tokenizer.save_vocabulary` are those that tokenizers' own BPE model saves."""
    import tokenizers

    save_tokenizer(source, tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(tmp_path / "theirs"))
    for name in ("vocab.json", "merges.txt"):
        ours, theirs = ((tmp_path / folder / name).read_text() for folder in ("out", "theirs"))
        assert json.loads(ours) == json.loads(theirs) if name == "vocab.json" else ours.strip() == theirs.strip()


def test_templates_and_flags_survive(source: Path, tmp_path: Path) -> None:
    """Saved again, from the saved one: the same bytes."""
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t\n\n"}]
    config["added_tokens_decoder"]["1024"] = {"content": "<tool>", "lstrip": True, "special": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    first, again = tmp_path / "first", tmp_path / "again"
    save_tokenizer(source, first)
    written = save_tokenizer(first, again)
    assert {p.relative_to(again): p.read_bytes() for p in written} == {
        p.relative_to(first): p.read_bytes() for p in first.rglob("*") if p.is_file()
    }
    shutil.copy(source / "config.json", again)
    oracle = AutoTokenizer.from_pretrained(again)
    assert oracle.chat_template == {"default": "d", "tool_use": "t\n\n"}
    token = oracle.added_tokens_decoder[1024]
    assert (token.content, token.lstrip, token.special) == ("<tool>", True, False)
    assert oracle("a <tool>b")["input_ids"] == Tokenizer(source).encode("a <tool>b")


def test_a_way_to_split_words_that_no_vocabulary_says_has_no_second_form(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "model")  # GPT-2's, with a ByteLevel pre-tokenizer alone
    names = {path.name for path in save_tokenizer(source, tmp_path / "out")}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert Tokenizer(tmp_path / "out").encode_chat(says("hello 日本")) == Tokenizer(source).encode_chat(
        says("hello 日本")
    )


def test_no_tokenizer_is_nothing_to_write_and_a_file_in_the_way_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert save_tokenizer(tmp_path / "empty", tmp_path / "out") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        save_tokenizer(source, tmp_path / "file")
