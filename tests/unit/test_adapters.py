"""LoRA adapters: their files against their base, the refusals, and an engine's list of them."""

import json
import re

import pytest
import torch
from configs import config, dense
from lora_tools import write_adapter
from safetensors.torch import load_file, save_file

from cluster import cli
from cluster.checkpoint.adapters import open_adapter
from cluster.cli.arguments import cluster_config
from cluster.config import ClusterConfig, EngineConfig, read_model_config
from cluster.config.lora import AdapterList, read_lora_config
from cluster.engine.adapters import Adapters
from cluster.engine.preflight import adapter_bytes
from cluster.errors import CheckpointError, NotFound, SetupError

BASE = read_model_config(config(num_hidden_layers=2, num_experts=4))
Q = "model.layers.{}.self_attn.q_proj"


def pair(num_outputs=32, num_inputs=32, rank=2):
    return torch.zeros(rank, num_inputs), torch.zeros(num_outputs, rank)


def of_queries(**changes):
    return {Q.format(0): pair(), Q.format(1): pair(), **changes}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only LORA is served"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True, which is not served: merge this adapter into its base"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is ['lm_head'], which is not served"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is"),
        ({"something_new": 1}, "something_new is 1, which is not served"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', by which the base was changed too"),
        ({"r": 0}, "r is 0, a whole number from 1 is needed"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": "("}, "target_modules has '(', which is no regular expression"),
        ({"target_modules": []}, "target_modules is []"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: q_proj is '8'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], an object is needed"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(given, part):
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **given}
    with pytest.raises(CheckpointError, match=re.escape(part)):
        read_lora_config(raw, "adapter_config.json")


def test_factors_follow_the_patterns_of_names():
    """alpha / r, or alpha / sqrt(r) with rsLoRA; the first pattern that a name ends with gives either."""
    raw = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 16}, "alpha_pattern": {"k_proj": 6}, "lora_dropout": 0.1,
    }  # fmt: skip
    plain, root = (read_lora_config({**raw, "use_rslora": on}, "a") for on in (False, True))
    assert [plain.scale_of(f"model.layers.{i}.self_attn.{name}") for i, name in ((0, "q_proj"), (0, "k_proj"))] == [
        4.0,
        1.5,
    ]
    assert plain.rank_of("model.layers.1.self_attn.k_proj") == 16
    assert root.scale_of("model.layers.1.self_attn.k_proj") == 1.5
    assert plain.targets("model.layers.0.self_attn.q_proj")
    assert not plain.targets("model.layers.0.self_attn.xq_proj")


@pytest.mark.parametrize(
    ("changes", "options", "part"),
    [
        ({Q.format(0): pair(num_inputs=64)}, {}, "for rank 2 the base needs [2, 32] and [32, 2]: it is for "),
        ({Q.format(7): pair()}, {}, "changes model.layers.7.self_attn.q_proj, which the base does not have"),
        ({"model.layers.0.mlp.c_fc": pair()}, {}, "which the base does not have: it is for another base"),
        ({"lm_head": pair(212)}, {}, "lm_head has lora_A [2, 32] and lora_B [212, 2], for rank 2 the base needs"),
        ({"model.layers.0.mlp.gate": pair(5)}, {}, "for rank 2 the base needs [2, 32] and [4, 2]"),
        ({"model.embed_tokens": pair(32, 211), "lm_head": pair(211)}, {"target_modules": ["lm_head"]},
         "model.embed_tokens is not among"),
        ({Q.format(0): pair(rank=3)}, {"r": 2}, "for rank 2 the base needs [2, 32]"),
        ({Q.format(0): pair(rank=9)}, {"r": 9}, "has rank 9, max_lora_rank is 8: serve with a higher one"),
        ({Q.format(0): pair()}, {}, "model.layers.1.self_attn.q_proj is among the target_modules"),
        (of_queries(), {"target_modules": ["k_proj"]}, f"{Q.format(0)}, {Q.format(1)} are not among"),
    ],
)  # fmt: skip
def test_an_adapter_for_another_base_is_refused_before_it_is_read(tmp_path, changes, options, part):
    directory = write_adapter(tmp_path / "adapter", changes, **options)
    with pytest.raises(CheckpointError, match=re.escape(part)):
        open_adapter(directory, BASE, 8)


def test_what_no_adapter_may_change_is_refused_by_its_name(tmp_path):
    """A head of labels; embeddings that are the head too. PEFT saves the base's embeddings beside an adapter's."""
    labels = read_model_config(config(architectures=["Qwen2MoeForSequenceClassification"], num_hidden_layers=1))
    directory = write_adapter(tmp_path / "score", {"score": pair(2)})
    with pytest.raises(CheckpointError, match="changes score, which is not served: train an adapter for q_proj"):
        open_adapter(directory, labels, 8)
    tied = read_model_config(config(num_hidden_layers=2, num_experts=4, tie_word_embeddings=True))
    directory = write_adapter(tmp_path / "words", {"model.embed_tokens": pair(32, 211)})
    with pytest.raises(CheckpointError, match=r"model.embed_tokens, which in this base is embeddings and head at once"):
        open_adapter(directory, tied, 8)
    path = directory / "adapter_model.safetensors"
    stored = "base_model.model.model.embed_tokens.base_layer.weight"
    for num_tokens in (211, 212):
        save_file({**load_file(path), stored: torch.zeros(num_tokens, 32)}, path)
        if num_tokens == 211:
            assert list(open_adapter(directory, BASE, 8).modules) == ["model.embed_tokens"]
    with pytest.raises(CheckpointError, match=r"has shape \[212, 32\], the base's is \[211, 32\]"):
        open_adapter(directory, BASE, 8)


def test_ranks_have_one_matrix_of_a_layer_in_parts_and_the_other_whole(tmp_path):
    """Of 2 ranks each has A [2, 32] and B [16, 2] of q_proj, A [2, 16] and B [32, 2] of o_proj: 96 numbers."""
    o_proj = {"model.layers.0.self_attn.o_proj": pair(), "model.layers.1.self_attn.o_proj": pair()}
    directory = str(write_adapter(tmp_path / "adapter", of_queries(**o_proj)))
    found = [
        adapter_bytes(BASE, EngineConfig(dtype="float32", lora_adapters={"a": directory}, tensor_parallel_size=size))
        for size in (1, 2)
    ]
    assert found == [{"a": (4 * 128 * 4, 0)}, {"a": (2 * 4 * 96 * 4, 0)}]


def test_files_that_are_no_adapter_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory: give the one that holds"):
        open_adapter(tmp_path / "nowhere", BASE, 8)
    directory = write_adapter(tmp_path / "adapter", of_queries())
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors: only safetensors weights are read"):
        open_adapter(directory, BASE, 8)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="r is missing"):
        open_adapter(directory, BASE, 8)


def test_a_layer_that_is_named_without_its_decoder_is_found(tmp_path):
    """As PEFT names those of a base without a head. 2 layers of 2 x (32 + 32) numbers."""
    directory = write_adapter(tmp_path / "adapter", {f"layers.{i}.self_attn.q_proj": pair() for i in range(2)})
    adapter = open_adapter(directory, BASE, 2)
    assert sorted(adapter.modules) == [Q.format(0), Q.format(1)]
    assert adapter.num_bytes("float32") == 2 * 2 * 64 * 4


def test_an_adapter_of_a_dense_model_has_the_layers_of_one(tmp_path):
    base = read_model_config(dense(num_hidden_layers=1))
    changes = {"model.layers.0.mlp.up_proj": pair(48)}
    assert open_adapter(write_adapter(tmp_path / "a", changes), base, 8).max_rank == 2
    with pytest.raises(CheckpointError, match="which the base does not have"):
        open_adapter(write_adapter(tmp_path / "b", {"model.layers.0.mlp.shared_expert.up_proj": pair(40)}), base, 8)


class FakeAdapter:
    num_bytes, has_experts = 3, False

    def __init__(self, source):
        if source.directory == "damaged":
            raise CheckpointError("damaged")
        self.source = source


def test_a_list_that_cannot_be_loaded_changes_nothing():
    adapters = Adapters(FakeAdapter)
    adapters.load("a", "x")
    first = adapters.find("a")
    with pytest.raises(CheckpointError):
        adapters.follow(adapters.current.loaded("b", "y", 5.0).loaded("c", "damaged", 6.0))
    assert adapters.names == ("a",)
    assert adapters.find("a") is first
    adapters.follow(adapters.current.loaded("b", "y", 7.0))
    assert adapters.find("a") is first
    assert adapters.num_bytes == 6
    adapters.follow(AdapterList(version=6.5))  # an older list, late
    assert adapters.names == ("a", "b")
    adapters.unload("a")
    with pytest.raises(NotFound, match="the adapter 'a' is not loaded; loaded: b"):
        adapters.find("a")


def test_a_name_that_is_loaded_again_is_another_adapter():
    adapters = Adapters(FakeAdapter)
    numbers = []
    for _ in range(2):
        adapters.load("a", "x")
        numbers.append(adapters.find("a").source.number)
        adapters.unload("a")
    adapters.load("a", "x")
    assert len({*numbers, adapters.find("a").source.number}) == 3


def test_names_and_directories_are_read_from_the_command_line(tmp_path):
    args = cli._parser().parse_args(["serve", "demo", "--lora-adapters", f"a={tmp_path}/x", "b=/y", "--max-loras", "3"])
    made = cluster_config(args, "demo")
    assert made.lora_adapters == {"a": f"{tmp_path}/x", "b": "/y"}
    assert made.max_loras == 3
    for wrong in (["a"], ["=x"], ["a=x", "a=y"]):
        with pytest.raises(SystemExit):
            cli._parser().parse_args(["serve", "demo", "--lora-adapters", *wrong])


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"a b": "/x"}, "lora_adapters has 'a b': a name of up to 128 letters"),
        ({"a": 1}, "lora_adapters has 1 for a, an adapter's directory is needed"),
        ({"a": "/x", "b": "/y"}, "lora_adapters has 2, max_loras is 1: allow more"),
    ],
)
def test_names_that_no_request_could_give_are_refused(given, part):
    with pytest.raises(SetupError, match=re.escape(part)):
        ClusterConfig(model="m", lora_adapters=given, max_loras=1)


def test_plan_says_how_many_bytes_an_adapter_takes(tmp_path, capsys):
    """Of rank 2 for two queries, (32 + 32) numbers each, and for one expert's down of 16 inputs and 32 outputs."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config(num_hidden_layers=2, num_experts=4)))
    down = "model.layers.1.mlp.experts.3.down_proj"
    targets = r".*(q_proj|experts\.3\.down_proj)"
    changes = {**of_queries(), down: pair(32, 16), down.replace("layers.1", "layers.0"): pair(32, 16)}
    write_adapter(tmp_path / "law", changes, target_modules=targets)
    command = ["plan", str(tmp_path / "model"), "--lora-adapters", f"law={tmp_path / 'law'}"]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == [
        {"name": "law", "attention_replica_bytes": 2 * 2 * 64 * 4, "expert_shards_bytes": 2 * 2 * 48 * 4}
    ]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("adapter law") == 2
    assert cli.main([*command, "--max-lora-rank", "1"]) == 2
    assert "has rank 2, max_lora_rank is 1" in capsys.readouterr().err
