"""Made-up checkpoints against transformers, which must take them for released ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2MoeForCausalLM

from cluster.checkpoint.generation import read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.made.tokenizer import write_tokenizer
from cluster.checkpoint.reader import CheckpointReader
from cluster.errors import CheckpointError

TINY: dict[str, Any] = {
    **A2_7B_CONFIG,
    "vocab_size": 64,
    "hidden_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "num_experts": 4,
}


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_demo_checkpoint(model_dir)
    return model_dir


@pytest.fixture(scope="module")
def model(demo_dir: Path) -> Any:
    loaded, info = Qwen2MoeForCausalLM.from_pretrained(demo_dir, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer(demo_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_dir)


def test_transformers_reads_the_same_weights_as_the_reader(demo_dir: Path, model: Any) -> None:
    """transformers stacks a layer's gate and up projections as [E, 2·I, H]."""
    reader = CheckpointReader(demo_dir)
    reader.check_names()
    gate_name = "model.layers.2.mlp.experts.63.gate_proj.weight"
    up_name = "model.layers.2.mlp.experts.63.up_proj.weight"
    bias_name = "model.layers.3.self_attn.k_proj.bias"
    targets = {gate_name: torch.empty(32, 64), up_name: torch.empty(32, 64), bias_name: torch.empty(32)}
    reader.load(targets)
    state = model.state_dict()
    gate, up = state["model.layers.2.mlp.experts.gate_up_proj"][63].chunk(2)
    assert torch.equal(targets[gate_name], gate)
    assert torch.equal(targets[up_name], up)
    assert torch.equal(targets[bias_name], state[bias_name])


def test_the_reader_reads_what_transformers_saves(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    reader.check_names()
    assert reader.config.num_experts == 64
    target = torch.empty(64, 64)
    reader.load({"model.layers.0.mlp.gate.weight": target})
    assert torch.equal(target, model.state_dict()["model.layers.0.mlp.gate.weight"])


def test_the_demo_is_the_same_for_a_seed_and_another_for_another(demo_dir: Path, tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "again")
    write_demo_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in demo_dir.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) >= 2
    assert sum(path.stat().st_size for path in demo_dir.iterdir()) < 10e6
    for name in names:
        content = (demo_dir / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content, name
        same = (tmp_path / "other" / name).read_bytes() == content
        assert same != name.endswith(".safetensors"), name


def test_a_dense_demo_is_a_whole_qwen2_checkpoint(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "dense", model_type="qwen2")
    dense, info = Qwen2ForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()), info
    assert dense.config.tie_word_embeddings
    CheckpointReader(tmp_path / "dense").check_tensors()
    assert read_sampling_defaults(tmp_path / "dense").top_k == 20
    with pytest.raises(CheckpointError, match="one of qwen2, qwen2_moe is needed for a demo"):
        write_demo_checkpoint(tmp_path / "other", model_type="llama")


def test_prompts_are_routed_to_nearly_all_experts_of_every_layer(model: Any) -> None:
    """512 random tokens, 8 experts each: 64 an expert. Nearly all are used, none by half of the tokens."""
    ids = torch.randint(0, 1021, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model(ids, output_router_logits=True).router_logits
    assert len(layers) == 4
    for router_logits in layers:  # [512, 64]
        load = torch.bincount(router_logits.topk(8).indices.flatten(), minlength=64)
        assert (load > 0).sum() >= 60
        assert load.max() < 256


def test_sampled_tokens_vary_and_depend_on_the_prompt(model: Any) -> None:
    """A distribution over 1024 tokens has at most log(1024) = 6.9 nats, one that repeats itself near none."""
    with torch.no_grad():
        logits = model(torch.arange(0, 1000, 50)[None]).logits[0]  # [20, 1024]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.min() > 3
    assert len(set(logits.argmax(-1).tolist())) > 10


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_transformers_tokenizes_as_tokenizers_does(tokenizer: Tokenizer, auto_tokenizer: Any, text: str) -> None:
    assert auto_tokenizer.encode(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "text",
    [
        "The old lighthouse keeper, he'd 217 stairs.\n\n  def f():\n",
        "Grüße 你好 🤔👋🏽 \x00\x7f",
        "<|im_end|>\n",
    ],
)
def test_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_text_is_normalized_and_common_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids
    assert tokenizer.encode("the experts").tokens == ["the", "Ġexperts"]
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]


def test_every_id_of_the_config_is_a_token(demo_dir: Path, tokenizer: Tokenizer) -> None:
    vocab_size = CheckpointReader(demo_dir).config.vocab_size
    assert vocab_size == tokenizer.get_vocab_size()
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))


def test_the_chat_template_writes_chatml(auto_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " a\n"}]
    assert auto_tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n a\n<|im_end|>\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("roles", "reason"),
    [(["wizard"], "role 'wizard' is unknown"), (["user", "system"], "system message must be the first")],
)
def test_the_chat_template_refuses_roles_that_it_does_not_know(
    auto_tokenizer: Any, roles: list[str], reason: str
) -> None:
    messages = [{"role": role, "content": "hi"} for role in roles]
    with pytest.raises(Exception, match=reason):
        auto_tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_demo_ends_at_im_end_and_samples_as_qwen_chat_models_do(demo_dir: Path, tokenizer: Tokenizer) -> None:
    ids = read_eos_token_ids(demo_dir, CheckpointReader(demo_dir).config)
    assert [tokenizer.id_to_token(token_id) for token_id in ids] == ["<|im_end|>", "<|endoftext|>"]
    params = read_sampling_defaults(demo_dir)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert params.max_tokens == 64


def test_random_weights_have_the_configs_dtype_and_deviation(tmp_path: Path) -> None:
    """The embedding has 64 · 128 values of deviation 0.02: 5 % are 6 standard errors of the sample's."""
    write_checkpoint(tmp_path, TINY, seed=0)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    embedding = tensors["model.embed_tokens.weight"].float()
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(embedding.mean().item()) < 0.002
    norm = tensors["model.norm.weight"].float()
    assert norm.mean().item() == pytest.approx(1, abs=0.05)
    assert norm.std().item() == pytest.approx(0.1, rel=0.35)
    assert (tensors["model.layers.0.self_attn.q_proj.bias"] != 0).all()
    experts = [tensors[f"model.layers.0.mlp.experts.{i}.up_proj.weight"] for i in range(2)]
    assert not torch.equal(*experts)


def test_a_tensor_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", TINY, seed=5)
    write_checkpoint(tmp_path / "b", {**TINY, "num_hidden_layers": 2}, seed=5, max_file_bytes=50_000)
    write_checkpoint(tmp_path / "c", TINY, seed=6)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    a, b, c = (
        next(t[name] for path in sorted(d.glob("*.safetensors")) if name in (t := load_file(path)))
        for d in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_files_keep_to_their_limit_and_the_index_names_them_all(tmp_path: Path) -> None:
    """The limit is for tensors: a header takes up to 8 KB here. 16,384 bytes are the largest matrices."""
    seen: list[tuple[int, int]] = []
    write_checkpoint(tmp_path, TINY, seed=0, max_file_bytes=40_000, progress=lambda *a: seen.append(a))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in files]
    assert max(sizes) <= 40_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert seen[-1] == (sum(sizes), sum(sizes))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with safe_open(tmp_path / files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "config.json").read_text()) == TINY


def test_weights_may_be_read_by_whoever_may_read_the_config(demo_dir: Path) -> None:
    assert len({path.stat().st_mode for path in demo_dir.iterdir()}) == 1


def test_a_directory_that_holds_weights_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="holds weights already"):
        write_demo_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model: writing [\d,]+ bytes failed"):
        write_checkpoint(tmp_path / "file" / "model", TINY, seed=0)


def test_a_tokenizer_of_any_size_decodes_every_token(tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, 151_936, 8192)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 151_936
    text = "The lighthouse keeper said: 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([5000, 151_932]) == " word5000 word151932"
    assert tokenizer.token_to_id("<|im_end|>") == 151_935
