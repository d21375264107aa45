"""Checkpoints as people have them give transformers' logits: fused, in several files, tied by the config alone, …"""

import json

import pytest
import torch
from configs import config, dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster import LLM
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import EMBEDDING, HEAD

FAMILIES = {
    "qwen2_moe": config(num_experts=6, num_experts_per_tok=2, num_hidden_layers=2),
    "qwen2": dense(num_hidden_layers=2),
}
PROMPT = [5, 9, 200, 17, 3]


@pytest.fixture(params=list(FAMILIES))
def model_dir(request, tmp_path):
    write_checkpoint(tmp_path / "model", FAMILIES[request.param], seed=5)
    return tmp_path / "model"


def settings(model_dir, **changes):
    path = model_dir / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def rewrite(model_dir, change):
    path = model_dir / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})


def tied_with_another_head(model_dir):
    settings(model_dir, tie_word_embeddings=True)


def tied_with_the_same_head(model_dir):
    settings(model_dir, tie_word_embeddings=True)
    rewrite(model_dir, lambda stored: stored.update({HEAD: stored[EMBEDDING].clone()}))


def tied_with_the_head_alone(model_dir):
    settings(model_dir, tie_word_embeddings=True)
    rewrite(model_dir, lambda stored: stored.pop(EMBEDDING))


def fused(model_dir):
    """As transformers 5 writes it, in several files."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, save_original_format=False, max_shard_size="30KB")
    assert len(list(model_dir.glob("*.safetensors"))) > 2


def float64(model_dir):
    settings(model_dir, torch_dtype="float64")
    rewrite(model_dir, lambda stored: stored.update({n: t.double() for n, t in stored.items()}))


def float16(model_dir):
    settings(model_dir, torch_dtype="float16")
    rewrite(model_dir, lambda stored: stored.update({n: t.half() for n, t in stored.items()}))


def bfloat16_without_a_word_of_it(model_dir):
    settings(model_dir, torch_dtype=None)
    rewrite(model_dir, lambda stored: stored.update({n: t.bfloat16() for n, t in stored.items()}))


@pytest.mark.parametrize(
    "change",
    [
        tied_with_another_head,
        tied_with_the_same_head,
        tied_with_the_head_alone,
        fused,
        float64,
        float16,
        bfloat16_without_a_word_of_it,
    ],
)
def test_logits_are_those_of_transformers(model_dir, change):
    change(model_dir)
    oracle = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    with LLM(
        model_dir, dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20, num_expert_shards=2
    ) as llm:
        torch.testing.assert_close(llm.logits(PROMPT), expected, atol=1e-4, rtol=0)


def test_files_without_an_index_are_all_read(model_dir):
    """transformers wants an index here: the oracle is the same checkpoint in one file."""
    with LLM(model_dir, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        expected = llm.logits(PROMPT)
    stored = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    for i in range(3):
        save_file({name: stored[name] for name in sorted(stored)[i::3]}, model_dir / f"part{i}.safetensors")
    with LLM(model_dir, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        assert torch.equal(llm.logits(PROMPT), expected)
