"""The files of released MoE models are accepted as they are: config, generation defaults, tokenizer, template."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, GenerationConfig

from cluster.checkpoint.chat_template import read_chat_templates
from cluster.checkpoint.generation import read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.made.tokenizer import write_tokenizer
from cluster.checkpoint.reader import read_config
from cluster.checkpoint.tokenizer_files import read_tokenizer_config
from cluster.config import EngineConfig
from cluster.engine.preflight import check_for_plan
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

FILES = Path(__file__).parents[1] / "data" / "published"
NAMES = sorted(path.name for path in FILES.iterdir() if path.is_dir())
SMALL, LARGE = (24, 16, 16, 60, 4, 151936), (28, 28, 4, 64, 8, 151936)


def raw_config(name):
    return json.loads((FILES / name / "config.json").read_text())


def test_there_are_the_four():
    assert NAMES == ["Qwen1.5-MoE-A2.7B", "Qwen1.5-MoE-A2.7B-Chat", "Qwen2-57B-A14B", "Qwen2-57B-A14B-Instruct"]


@pytest.mark.parametrize(
    ("name", "structure", "context"),
    [(NAMES[0], SMALL, 8192), (NAMES[1], SMALL, 32768), (NAMES[2], LARGE, 131072), (NAMES[3], LARGE, 32768)],
)
def test_the_config_has_the_published_structure(name, structure, context):
    _, config = read_config(FILES / name)
    assert config.moe is not None
    assert structure == (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.num_experts,
        config.num_experts_per_tok, config.vocab_size,
    )  # fmt: skip
    assert config.sparse_layers == tuple(range(config.num_hidden_layers))
    assert (config.moe.norm_topk_prob, config.qkv_bias, config.tie_word_embeddings) == (False, True, False)
    assert (config.sliding_window, set(config.layer_types)) == (None, {"full_attention"})
    assert (config.dtype, config.context_length, config.rope.theta) == ("bfloat16", context, 1e6)
    assert check_for_plan(FILES / name, EngineConfig(), 7) == config


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same_from_it(name):
    _, config = read_config(FILES / name)
    theirs = AutoConfig.from_pretrained(FILES / name)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
                "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert getattr(config, key) == getattr(theirs, key), key
    for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
                "shared_expert_intermediate_size"):  # fmt: skip
        assert getattr(config.moe, key) == getattr(theirs, key), key
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert list(config.layer_types) == theirs.layer_types


@pytest.mark.parametrize("name", NAMES)
def test_the_generation_defaults_are_those_that_transformers_reads(name):
    found, theirs = read_sampling_defaults(FILES / name), GenerationConfig.from_pretrained(FILES / name)
    if theirs.do_sample:
        assert (found.temperature, found.top_p, found.top_k) == (theirs.temperature, theirs.top_p, theirs.top_k)
        assert (found.repetition_penalty, found.max_tokens) == (theirs.repetition_penalty, None)
    else:
        limit = SamplingParams(temperature=0.0, max_tokens=theirs.max_new_tokens)
        assert found == limit.with_defaults(SAMPLING_DEFAULTS)


@pytest.mark.parametrize(("name", "ends"), zip(NAMES, [{151643}, {151645, 151643}] * 2, strict=True))
def test_an_answer_ends_with_every_published_id(name, ends):
    _, config = read_config(FILES / name)
    assert set(read_eos_token_ids(FILES / name, config)) == ends


@pytest.mark.parametrize("name", NAMES)
def test_the_template_greets_as_its_makers_wrote_it(name):
    """Qwen1.5 ends its system message without a full stop, Qwen2 with one."""
    config = read_tokenizer_config(FILES / name)
    assert set(read_chat_templates(FILES / name, config)) == {"default"}
    assert ("assistant.<|im_end|>" in config["chat_template"]) == name.startswith("Qwen2-")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A made one of the published size, with the special tokens behind it: ids 151,643 to 151,645."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(folder, 151646, 32768)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", [NAMES[1], NAMES[3]])
def test_a_tokenizer_with_the_published_ids_reads_and_writes_them(name, vocabulary, tmp_path):
    for path in (*(FILES / name).iterdir(), vocabulary):
        shutil.copy(path, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n<|endoftext|>")
    assert (ids[0], ids[-1]) == (151644, 151643)
    assert 151645 in ids


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_the_shapes_that_benches_use_are_those_of_the_published_files(name):
    """But for the context, which has another length in every model of a family, and what names versions."""
    skipped = {"transformers_version", "max_position_embeddings", "sliding_window", "eos_token_id"}
    published = {key: value for key, value in raw_config(name).items() if key not in skipped}
    assert published.items() <= dict(PUBLISHED[name]).items()
