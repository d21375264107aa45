"""Tokenizers whose files say more than is needed, or different things: read as transformers reads them.

A layout is made at random: which files are there, which tokens each of them lists with which flags, and how the config
names them. Two kinds of layouts are refused here and not there: a file that gives a token another id than the
vocabulary, and several tokens without an id in any file.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.errors import CheckpointError
from cluster.serving.text.tokenizer import Tokenizer

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "foo", "日本", "Bar", "é"]
NAMES = ("eos_token", "pad_token", "unk_token", "bos_token")
UNNAMED = ("additional_special_tokens", "extra_special_tokens")
TEXTS = [
    "Hello  foo bar Foo é foofoo <tool>x </tool> 日本 <|im_start|>user\nhi<|im_end|> \n<|endoftext|>",
    "a <tool> b  <|im_end|>  c foo d <|im_end|>",
    "Bar bar barBar foo, e\u0301 e\u0301x\u00a0 123 45 \u1e9b\u0323",
]


class Layout:
    """Writes one random layout of the demo's tokenizer."""

    def __init__(self, demo: Path, path: Path, seed: int) -> None:
        self.path, self.random = path, random.Random(seed)
        self.base = json.loads((demo / "tokenizer.json").read_text())
        vocab = self.base["model"]["vocab"]
        self.tokens = self.some(TOKENS, 0.7)
        new = [token for token in self.tokens if token not in vocab]
        self.ids = {token: vocab[token] if token in vocab else len(vocab) + new.index(token) for token in self.tokens}
        self.flags = {token: self.any_flags() for token in self.tokens}
        self.write("config.json", json.loads((demo / "config.json").read_text()) | self.one("model_type", FAMILIES))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def some(self, values: list[str], whole: float) -> list[str]:
        return values if self.chance(whole) else values[: self.random.randint(0, len(values))]

    def one(self, name: str, values: Any) -> dict[str, Any]:
        return {name: self.random.choice(values)}

    def any_flags(self) -> dict[str, bool]:
        names = ("lstrip", "rstrip", "single_word", "normalized", "special")
        return {name: self.chance(0.6 if name == "special" else 0.25) for name in names}

    def write(self, name: str, value: Any) -> None:
        self.path.mkdir(exist_ok=True)
        (self.path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    def vocabulary(self) -> None:
        kind = self.random.choice(["json", "vocabulary", "both"])
        if kind != "vocabulary":
            flags = {token: self.flags[token] if self.chance(0.8) else self.any_flags() for token in self.tokens}
            added = [{"id": self.ids[t], "content": t, **flags[t]} for t in self.some(self.tokens, 0.7)]
            self.write("tokenizer.json", self.base | {"added_tokens": sorted(added, key=lambda token: token["id"])})
        if kind != "json":
            merges = "\n".join(" ".join(pair) for pair in self.base["model"]["merges"])
            self.write("vocab.json", self.base["model"]["vocab"])
            self.write("merges.txt", f"#version: 0.2\n{merges}\n")

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {}
        if self.chance(0.6):
            listed = self.some(self.tokens, 0.7)
            config["added_tokens_decoder"] = {str(self.ids[t]): {"content": t, **self.flags[t]} for t in listed}
        for name in NAMES:
            if self.tokens and self.chance(0.3):
                config[name] = self.random.choice(self.tokens)
                if self.chance(0.2):
                    config[name] = {"__type": "AddedToken", "content": config[name], **self.any_flags()}
            elif self.chance(0.3):
                config[name] = None
        if self.tokens and self.chance(0.3):
            config[self.random.choice(UNNAMED)] = self.random.sample(self.tokens, min(2, len(self.tokens)))
        if self.tokens and self.chance(0.15):
            config["extra_special_tokens"] = self.one("image_token", self.tokens)
        if self.tokens and self.chance(0.15):
            config |= self.one("video_token", self.tokens)
        return config | self.one("add_prefix_space", [True, False]) | self.one("tokenizer_class", CLASSES)

    def older_files(self) -> None:
        if self.tokens and self.chance(0.3):
            self.write("added_tokens.json", self.ids)
        named: dict[str, Any] = {name: self.random.choice(self.tokens) for name in NAMES[:2] if self.tokens}
        if self.tokens and self.chance(0.5):
            named["eos_token"] = {"content": self.random.choice(self.tokens), "lstrip": self.chance(0.5)}
            named[self.random.choice(UNNAMED)] = self.tokens[:2]
        if self.chance(0.3):
            self.write("special_tokens_map.json", named)


FAMILIES = ["qwen2", "qwen2_moe"]
CLASSES = ["Qwen2Tokenizer", "Qwen2TokenizerFast", None, "PreTrainedTokenizerFast"]


def reading(encode: Callable[[str], list[int]], decode: Callable[[list[int], bool], str]) -> list[Any]:
    ids = [encode(text) for text in TEXTS]
    return [(one, decode(one, True), decode(one, False)) for one in ids]


def allowed(path: Path) -> Tokenizer | None:
    """The tokenizer; None for one that is refused for its ids. Raises another refusal."""
    try:
        return Tokenizer(path)
    except CheckpointError as error:
        if re.search(r"no id in any file|with this vocabulary it is", str(error)):
            return None
        raise


@pytest.mark.parametrize("seed", range(8))
def test_any_layout_is_read_as_transformers_reads_it(demo_checkpoint: Path, tmp_path: Path, seed: int) -> None:
    num_same = 0
    for number in range(8):
        layout = Layout(demo_checkpoint, tmp_path / str(number), 1000 * seed + number)
        layout.vocabulary()
        config = layout.config()
        if config or layout.chance(0.7):
            layout.write("tokenizer_config.json", config)
        layout.older_files()
        try:
            oracle = AutoTokenizer.from_pretrained(layout.path)
        except (TypeError, ValueError):  # it needs a tokenizer.json for PreTrainedTokenizerFast
            continue
        ours = allowed(layout.path)
        if ours is None:
            continue
        theirs = reading(
            lambda text: oracle(text)["input_ids"],  # noqa: B023 called at once
            lambda ids, skip: oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False),  # noqa: B023
        )
        assert reading(ours.encode, ours.decode) == theirs, config
        assert ours.vocab_size == len(oracle)
        assert ours._chat._special_tokens == oracle.special_tokens_map
        num_same += 1
        shutil.rmtree(layout.path)
    assert num_same > 3
