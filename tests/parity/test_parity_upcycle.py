"""Without redrawing, an upcycled model is the dense one: its numbers are transformers' for the dense model."""

import pytest
import torch
from configs import dense
from head_tools import HEADS, close, llm_for
from transformers import AutoModelForCausalLM

from cluster import LLM
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.writing.upcycle import Recipe, upcycle
from cluster.cli import main

PROMPT = [5, 9, 200, 17, 3, 3, 120, 77]
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
DENSE = {
    "plain": dense(intermediate_size=96),
    "tied, sliding": dense(intermediate_size=96, tie_word_embeddings=True, **SLIDING),
}


@pytest.fixture(scope="module", params=list(DENSE))
def dense_model(request, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("dense") / "model"
    write_checkpoint(model_dir, DENSE[request.param], seed=9)
    return model_dir, ask(model_dir)


def ask(model_dir, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(experts=12, granularity=4, shared=2, noise=0, top_k=12),
        Recipe(experts=4, granularity=4, shared=4, noise=0, top_k=4),
        Recipe(experts=9, granularity=3, shared=4, noise=0, top_k=9),  # more shared neurons than the FFN has
        Recipe(experts=16, granularity=4, shared=1, noise=0),  # one copy of four is chosen whole
        Recipe(experts=2, granularity=1, shared=1, noise=0, top_k=2),
    ],
    ids=["three copies", "one copy", "a shared expert beyond the FFN", "the best copy alone", "uncut"],
)
def test_an_upcycled_model_gives_the_dense_models_logits(dense_model, tmp_path, recipe):
    model_dir, expected = dense_model
    upcycle(model_dir, tmp_path / "out", recipe)
    torch.testing.assert_close(ask(tmp_path / "out"), expected, atol=1e-4, rtol=0)
    with LLM(tmp_path / "out", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        assert llm.info.num_experts == recipe.experts
        torch.testing.assert_close(llm.logits(PROMPT), expected, atol=1e-4, rtol=0)


def test_a_redrawn_model_is_another_one_and_reads_the_same_in_both(dense_model, tmp_path):
    """The command as README shows it."""
    model_dir, expected = dense_model
    recipe = ["--experts", "64", "--granularity", "8", "--shared", "4", "--noise", "0.5"]
    assert main(["upcycle", str(model_dir), str(tmp_path / "out"), *recipe]) == 0
    logits = ask(tmp_path / "out")
    assert (logits - expected).abs().max() > 0.1
    with LLM(tmp_path / "out", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        torch.testing.assert_close(llm.logits(PROMPT), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_with_a_head_keeps_it(written, tmp_path, head):
    oracle = written("Qwen2", head)
    upcycle(oracle.model_dir, tmp_path / "out", Recipe(experts=8, granularity=4, shared=2, noise=0))
    expected = oracle(PROMPT)
    with llm_for(tmp_path / "out") as llm:
        match head:
            case "Model":
                close(llm.embed([PROMPT], normalize=False)[0].embedding, expected.last_hidden_state[0, -1])
            case "ForSequenceClassification":
                close(llm.classify([PROMPT])[0].logits, expected.logits[0])
            case "ForTokenClassification":
                close(llm.classify_tokens([PROMPT])[0].logits, expected.logits[0])
            case _:
                close(llm.answer_spans([PROMPT])[0].start_logits, expected.start_logits[0])
