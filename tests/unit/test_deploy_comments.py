"""The comments in deploy/serve*.yaml say what the fields, the schema of Serve and the published models say."""

import re
from dataclasses import fields

import config_docs
import pytest
import yaml
from ray.serve.schema import ServeApplicationSchema, gRPCOptionsSchema

from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.model_files import pinned
from cluster.checkpoint.names import dense_bytes
from cluster.config import ClusterConfig, read_model_config
from cluster.config.speculation import METHODS, Speculation
from cluster.pb.moecluster.v1 import inference_pb2 as pb

FILES = {path.name: path.read_text() for path in config_docs.SERVE_FILES}
SHAPES = [
    ("serve.yaml", "Qwen1.5-MoE-A2.7B"), ("serve-57b.yaml", "Qwen2-57B-A14B"), ("serve-dense.yaml", "Qwen2-7B"),
    ("serve-experts-on-cpu.yaml", "Qwen1.5-MoE-A2.7B"),
]  # fmt: skip


def comments(text):
    return "\n".join(re.findall(r"(?:^|\s)#(.*)", text))


@pytest.mark.parametrize("name", FILES)
def test_the_comment_above_an_argument_is_its_fields_help_text(name):
    """`python tests/config_docs.py` writes it; a value that is not the default has that in its comment."""
    assert config_docs.with_comments(FILES[name]) == FILES[name]


def test_a_value_that_is_not_the_default_has_the_default_in_its_comment():
    assert (
        "# sequences in one step of an engine at most (default: 64)\n      max_num_seqs: 128\n" in FILES["serve.yaml"]
    )


@pytest.mark.parametrize("name", FILES)
def test_a_name_in_a_comment_is_one_of_a_field_of_serves_schema_or_of_the_api(name):
    schema = ServeApplicationSchema.model_fields.keys() | gRPCOptionsSchema.model_fields.keys()
    known = schema | set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) | {f.name for f in fields(ClusterConfig)}
    known |= {"lm_head"}  # of a checkpoint: `quantization` may name it
    known |= {f.name for f in fields(Speculation)} | set(METHODS)
    text = comments(re.sub(r'python -c "[^"]+"', "", FILES[name]))
    assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)) - known == set()


@pytest.mark.parametrize("name", FILES)
def test_a_value_in_a_comment_is_one_that_its_field_takes(name):
    for field, value in re.findall(r"`(\w+): ([^`]+)`", comments(FILES[name])):
        ClusterConfig.from_mapping({"model": "m", field: yaml.safe_load(value)})


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_the_bytes_in_the_comments_are_those_of_the_model(name, model):
    """Gigabytes as written, to the last figure."""
    config = read_model_config(PUBLISHED[model])
    args = yaml.safe_load(FILES[name])["applications"][0]["args"]
    experts = config.expert_bytes("bfloat16") * len(config.sparse_layers)
    slice_bytes = experts * config.num_experts // max(args["expert_shards"], 1)
    known_gb = [dense_bytes(config, "bfloat16"), slice_bytes, 2 * slice_bytes, experts * config.num_experts]
    texts = comments(FILES[name])
    named = [gb for gb in re.findall(r"([\d.]+) GB\b", texts) if "." in gb]  # a GPU's is a whole number
    assert len(named) >= (2 if config.num_experts else 1)
    for gb in named:
        digits = len(gb.partition(".")[2])
        assert gb in [f"{known / 1e9:.{digits}f}" for known in known_gb]
    for part, whole in re.findall(r"(\d+) of the (\d+) experts", texts):
        assert (int(whole), int(part) * args["expert_shards"]) == (config.num_experts, config.num_experts)


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_the_tokens_in_the_comment_fit_the_cache(name, model):
    [(gib, tokens, token_bytes)] = re.findall(r"(\d+) GiB[:,] ([\d,]+) tokens of ([\d,]+) bytes", FILES[name])
    cache_bytes = yaml.safe_load(FILES[name])["applications"][0]["args"]["kv_cache_bytes"]
    assert int(gib) << 30 == cache_bytes
    expected = read_model_config(PUBLISHED[model]).kv_bytes_per_token("bfloat16")
    assert int(token_bytes.replace(",", "")) == expected
    assert int(tokens.replace(",", "")) == cache_bytes // expected


def test_the_laptops_file_serves_the_model_that_the_package_has():
    assert yaml.safe_load(FILES["serve-laptop.yaml"])["applications"][0]["args"]["model"] == "demo"
    assert pinned("demo").startswith("demo@")  # with the hash of its files
