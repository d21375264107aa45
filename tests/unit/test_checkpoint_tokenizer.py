"""Tokenizers in the files that people have, against transformers' reading of them; and the ids that end an answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import says
from transformers import AutoTokenizer

from cluster.checkpoint.generation import find_end_ids, read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.reader import CheckpointReader
from cluster.errors import CheckpointError
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SAMPLING_DEFAULTS

ENDOFTEXT, IM_START, IM_END = 1021, 1022, 1023
ADDED = {"<|endoftext|>": ENDOFTEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
TEXTS = [
    "Hello, world! It's 2024;  three   spaces\tand\n\nlines \r\n",
    "Grüße, e\u0301 und \u1e9b\u0323: 你好、世界 🙂👋🏽 \u200bzero\u00a0width",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end",
    "don't I'LL we'Ve 'S ''s 12345 x1y2 ___ ~~~\n  \n",
]


@pytest.fixture
def model_dir(demo_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))


def change(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; None takes one away."""
    raw = {**(json.loads(path.read_text()) if path.exists() else {}), **keys}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def as_vocabulary(model_dir: Path) -> None:
    """tokenizer.json as the two files that it was made from."""
    raw = json.loads((model_dir / "tokenizer.json").read_text())["model"]
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "vocab.json").write_text(json.dumps(raw["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in raw["merges"])
    (model_dir / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def only_in_the_config(model_dir: Path) -> None:
    change(model_dir / "tokenizer.json", added_tokens=[])


def vocabulary_and_config(model_dir: Path) -> None:
    as_vocabulary(model_dir)


def vocabulary_and_added_tokens(model_dir: Path) -> None:
    as_vocabulary(model_dir)
    change(model_dir / "tokenizer_config.json", added_tokens_decoder=None)
    change(model_dir / "added_tokens.json", **ADDED)


def vocabulary_and_special_tokens_map(model_dir: Path) -> None:
    as_vocabulary(model_dir)
    (model_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    change(model_dir / "added_tokens.json", **ADDED)
    names = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "additional_special_tokens": ["<|im_start|>"]}
    change(model_dir / "special_tokens_map.json", **names)


def vocabulary_alone(model_dir: Path) -> None:
    as_vocabulary(model_dir)
    (model_dir / "tokenizer_config.json").unlink()


def prefix_space(model_dir: Path) -> None:
    as_vocabulary(model_dir)
    change(model_dir / "tokenizer_config.json", add_prefix_space=True)


LAYOUTS = [
    only_in_the_config,
    vocabulary_and_config,
    vocabulary_and_added_tokens,
    vocabulary_and_special_tokens_map,
    vocabulary_alone,
    prefix_space,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_encodes_as_transformers_does(model_dir: Path, layout: Callable[[Path], None]) -> None:
    layout(model_dir)
    ours, theirs = Tokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(max_size=40) | st.lists(st.sampled_from(TEXTS + list(ADDED) + [" ", "é"])).map("".join))
    def same_ids(text: str) -> None:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected
        for skip in (False, True):
            decoded = theirs.decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(expected, skip_special_tokens=skip) == decoded

    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    same_ids()
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("layout", [*LAYOUTS, lambda model_dir: None])
def test_the_end_of_every_layout_is_transformers_own(model_dir: Path, layout: Callable[[Path], None]) -> None:
    """A vocabulary alone has <|endoftext|> after its last token, where a name is given to one: 1021 in both."""
    layout(model_dir)
    (model_dir / "generation_config.json").unlink()
    change(model_dir / "config.json", eos_token_id=None)
    expected = AutoTokenizer.from_pretrained(model_dir).eos_token_id
    found = read_eos_token_ids(model_dir, CheckpointReader(model_dir).config)
    assert found == (expected,)


def test_the_tokenizers_eos_ends_an_answer_beside_the_configs(model_dir: Path) -> None:
    """Many fine-tunes: config.json has the base model's <|endoftext|>, and the tokenizer alone says <|im_end|>."""
    (model_dir / "generation_config.json").unlink()
    change(model_dir / "config.json", eos_token_id=ENDOFTEXT)
    config = CheckpointReader(model_dir).config
    assert read_eos_token_ids(model_dir, config) == (ENDOFTEXT, IM_END)
    origins = [(end.token_id, end.origin) for end in find_end_ids(model_dir, config)]
    assert origins == [
        (ENDOFTEXT, f"{model_dir / 'config.json'}: eos_token_id"),
        (IM_END, f"{model_dir / 'tokenizer_config.json'}: eos_token"),
    ]
    change(model_dir / "tokenizer_config.json", eos_token="<|im_start|>", added_tokens_decoder=None)
    assert read_eos_token_ids(model_dir, config) == (ENDOFTEXT, IM_START)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, ENDOFTEXT]}))
    assert read_eos_token_ids(model_dir, config) == (5, ENDOFTEXT, IM_START)


@pytest.mark.parametrize("eos", [7, 1.5, True, ["<|im_end|>"], {"content": 7}])
def test_a_special_token_that_is_no_text_is_refused_as_in_transformers(model_dir: Path, eos: Any) -> None:
    from transformers import Qwen2Tokenizer

    config = CheckpointReader(model_dir).config
    change(model_dir / "tokenizer_config.json", eos_token=eos)
    with pytest.raises(TypeError, match="eos_token has to be"):
        Qwen2Tokenizer.from_pretrained(model_dir)
    for read in (lambda: Tokenizer(model_dir), lambda: read_eos_token_ids(model_dir, config)):
        with pytest.raises(CheckpointError, match=r"_config.json: eos_token is .*, the token's text is needed"):
            read()


@pytest.mark.parametrize("eos", ["<|nothing|>", "</s>", ""])
def test_an_eos_without_an_id_ends_nothing(model_dir: Path, eos: Any) -> None:
    (model_dir / "generation_config.json").unlink()
    change(model_dir / "tokenizer_config.json", eos_token=eos)
    assert read_eos_token_ids(model_dir, CheckpointReader(model_dir).config) == (IM_END,)


def test_the_end_of_a_fine_tune_stops_its_answers(model_dir: Path) -> None:
    """The engine knows the id, and GetModelInfo tells it: a token that is forced to be the tokenizer's eos ends it."""
    from cluster import LLM, SamplingParams

    (model_dir / "generation_config.json").unlink()
    change(model_dir / "config.json", eos_token_id=ENDOFTEXT)
    with LLM(model_dir, device="cpu", kv_cache_bytes=1 << 20) as llm:
        assert llm.info.eos_token_ids == (ENDOFTEXT, IM_END)
        greedy = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4))[0].token_ids
    tokens = json.loads((model_dir / "tokenizer.json").read_text())
    spelled = next(token for token, token_id in tokens["model"]["vocab"].items() if token_id == greedy[1])
    change(model_dir / "tokenizer_config.json", eos_token=spelled)
    with LLM(model_dir, device="cpu", kv_cache_bytes=1 << 20) as llm:
        output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4))[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == greedy[:2]


@pytest.mark.parametrize(
    "file_name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_byte_order_mark_is_no_part_of_any_file(model_dir: Path, file_name: str) -> None:
    expected = Tokenizer(model_dir).encode_chat(says("hi"))
    defaults = read_sampling_defaults(model_dir)
    path = model_dir / file_name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer(model_dir).encode_chat(says("hi")) == expected
    assert read_sampling_defaults(model_dir) == defaults
    assert read_eos_token_ids(model_dir, CheckpointReader(model_dir).config) == (IM_END, ENDOFTEXT)


@pytest.mark.parametrize("file_name", ["vocab.json", "merges.txt", "chat_template.jinja"])
def test_a_byte_order_mark_of_the_other_files_as_well(model_dir: Path, file_name: str) -> None:
    as_vocabulary(model_dir)
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    expected = Tokenizer(model_dir).encode_chat(says("hi"))
    path = model_dir / file_name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer(model_dir).encode_chat(says("hi")) == expected


def _decoder(**tokens: Any) -> Callable[[Path], None]:
    return lambda d: change(d / "tokenizer_config.json", added_tokens_decoder=tokens)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_decoder(**{"1030": {"content": "<|new|>"}}), "gives '<|new|>' the id 1030, with this vocabulary it is 1021"),
        (_decoder(**{"3": {"content": "<|im_end|>"}}), "gives '<|im_end|>' the id 3, with this vocabulary it is 1021"),
        (_decoder(x={"content": "<|new|>"}), "added_tokens_decoder has {'content': '<|new|>'} for 'x'"),
        (_decoder(**{"1024": "<|new|>"}), "added_tokens_decoder has '<|new|>' for '1024'"),
        (_decoder(**{"1024": {"content": "<|new|>", "lstrip": 1}}), "for '1024'"),
        (_decoder(**{"1024": {"content": "\ud800"}}), "has {'content': '\\ud800'} for '1024'"),
        (lambda d: change(d / "tokenizer_config.json", added_tokens_decoder=[1]), "added_tokens_decoder is [1]"),
        (lambda d: change(d / "tokenizer_config.json", additional_special_tokens="x"), "additional_special_tokens is"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing, and vocab.json with merges.txt"),
        (lambda d: (as_vocabulary(d), (d / "merges.txt").unlink()), "tokenizer.json is missing"),
        (lambda d: (as_vocabulary(d), (d / "merges.txt").write_text("a b c\n")), "'a b c' is no merge of two"),
        (lambda d: (as_vocabulary(d), (d / "merges.txt").write_text("qq zz\n")), "cannot be read as a tokenizer"),
        (lambda d: (as_vocabulary(d), (d / "vocab.json").write_text('{"a": "b"}')), "vocab.json: a has no id"),
        (lambda d: (as_vocabulary(d), (d / "vocab.json").write_text('{"a": 1e9}')), "vocab.json: a has no id"),
        (
            lambda d: (as_vocabulary(d), change(d / "tokenizer_config.json", added_tokens_decoder=None)),
            "have no id in any file: put the tokenizer.json",
        ),
        (
            lambda d: (d / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "chat_template.jinja is a pointer of Git LFS",
        ),
        (lambda d: (d / "chat_template.jinja").write_text("{% for i in x %}" * 40 + "{% endfor %}" * 40), "compiled"),
        (lambda d: (d / "chat_template.jinja").write_text("{{" + "(" * 9999 + ")" * 9999 + "}}"), "compiled"),
        (lambda d: (d / "chat_template.jinja").write_text("{% include 'x' "), "compiled"),
    ],
)
def test_a_tokenizer_that_says_two_things_is_refused(
    model_dir: Path, damage: Callable[[Path], Any], named: str
) -> None:
    damage(model_dir)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(model_dir)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_constant_in_a_template_is_not_computed_when_it_is_read(model_dir: Path) -> None:
    """9 ** 9 ** 9 has 369 million digits: jinja2's optimizer would make them."""
    (model_dir / "chat_template.jinja").write_text("{% if messages|length > 9 %}{{ 9 ** 9 ** 9 }}{% endif %}hi")
    assert Tokenizer(model_dir).encode_chat(says("x")) == Tokenizer(model_dir).encode("hi")


@pytest.mark.parametrize(
    ("written", "field", "expected"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 20.0}, "top_k", 20),
        ({"top_k": None}, "top_k", SAMPLING_DEFAULTS.top_k),
        ({"top_k": -1.0}, "top_k", 0),
        ({"max_new_tokens": 64.0}, "max_tokens", 64),
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": 0.0, "do_sample": True}, "temperature", 0),
        ({"do_sample": False, "temperature": None}, "temperature", 0),
        ({"do_sample": None, "temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 1}, "top_p", 1),
        ({"repetition_penalty": 1}, "repetition_penalty", 1),
        ({"max_length": 20, "penalty_alpha": 0.6, "pad_token_id": [1]}, "max_tokens", None),
    ],
    ids=str,
)  # fmt: skip
def test_generation_configs_are_read_as_people_write_them(
    tmp_path: Path, written: dict[str, Any], field: str, expected: Any
) -> None:
    """vLLM: -1 keeps all tokens, greedy at 0; transformers: `do_sample` false is greedy, a null is as if missing."""
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    value = getattr(read_sampling_defaults(tmp_path), field)
    assert value == expected
    assert type(value) in (int, float, type(None))
    assert field != "top_k" or type(value) is int


@pytest.mark.parametrize(
    ("file_name", "key", "value", "named"),
    [
        ("generation_config.json", "top_k", -2, "top_k is -2"),
        ("generation_config.json", "top_k", 1e300, "top_k is"),
        ("generation_config.json", "top_k", "20", "top_k is '20'"),
        ("generation_config.json", "max_new_tokens", -1, "max_new_tokens is -1"),
        ("generation_config.json", "do_sample", 1, "do_sample is 1"),
        ("generation_config.json", "eos_token_id", "<|im_end|>", "eos_token_id has '<|im_end|>'"),
        ("generation_config.json", "eos_token_id", 1024, "eos_token_id has 1024, ids from 0 to 1023 are needed"),
        ("config.json", "eos_token_id", [1023, 151643], "config.json: eos_token_id has 151643, ids from 0 to 1023"),
        ("config.json", "eos_token_id", "<|im_end|>", "eos_token_id is '<|im_end|>'"),
        ("config.json", "num_experts", None, "num_experts is missing"),
        ("config.json", "rms_norm_eps", "1e-6", "rms_norm_eps is '1e-6'"),
        ("config.json", "torch_dtype", "bf16", "dtype is 'bf16', one of float32, bfloat16"),
        ("config.json", "head_dim", 15, "head_dim is 15"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_key(
    model_dir: Path, file_name: str, key: str, value: Any, named: str
) -> None:
    from cluster.config import EngineConfig
    from cluster.engine.preflight import check_checkpoint

    change(model_dir / file_name, **{key: value})
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(model_dir, EngineConfig(), 2)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_epsilon_and_a_head_of_its_own_are_read(model_dir: Path) -> None:
    change(model_dir / "config.json", rms_norm_eps=1, head_dim=16)
    config = CheckpointReader(model_dir).config
    assert (config.rms_norm_eps, config.head_dim) == (1.0, 16)
