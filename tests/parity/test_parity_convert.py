"""A converted checkpoint gives the logits that transformers gives for the original, there and here."""

import pytest
import torch
import transformers
from configs import NEW_STYLE, config, dense
from head_tools import write
from transformers import AutoModelForCausalLM

from cluster import LLM
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.writing.convert import convert
from cluster.checkpoint.writing.upcycle import Recipe, upcycle

PROMPT = [5, 9, 200, 17, 3]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SMALL = {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def ask(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model, model(torch.tensor([PROMPT])).logits[0]


def as_transformers_5(model, source):
    """Fused experts, the new keys of config.json."""
    model.save_pretrained(source, save_original_format=False, max_shard_size="30KB")


def as_transformers_4(model, source):
    """Experts one by one, in several files."""
    model.save_pretrained(source, max_shard_size="30KB")


def pickled(model, source):
    model.config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")


def wrapped_by_peft(model, source):
    model.config.save_pretrained(source)
    torch.save({f"base_model.model.{name}": t for name, t in model.state_dict().items()}, source / "merged.pt")


@pytest.mark.parametrize("save", [as_transformers_5, as_transformers_4, pickled, wrapped_by_peft])
@pytest.mark.parametrize(
    "raw",
    [
        config(**SMALL),
        config(**SMALL, **{**NEW_STYLE, "rope_parameters": YARN}),
        config(**SMALL, tie_word_embeddings=True, norm_topk_prob=True),
        dense(**{**NEW_STYLE, "rope_parameters": YARN}, tie_word_embeddings=True),
    ],
    ids=["moe", "moe, YARN", "moe, tied", "dense, YARN, tied"],
)
def test_a_converted_checkpoint_has_the_same_logits(tmp_path, raw, save):
    write_checkpoint(tmp_path / "made", raw, seed=7)
    model, expected = ask(tmp_path / "made")
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    save(model, source)
    convert(source, out, max_file_bytes=40_000, from_pickle=save in (pickled, wrapped_by_peft))
    _, logits = ask(out)
    assert torch.equal(logits, expected)
    with LLM(out, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        torch.testing.assert_close(llm.logits(PROMPT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen2Moe"])
def test_every_head_is_converted_and_upcycled(tmp_path, family, head):
    """The dense family's question answering has names of its own in transformers, which must come out again."""
    oracle = write(tmp_path / "in", family, head)
    expected = oracle(PROMPT)
    convert(tmp_path / "in", tmp_path / "out")
    found = {family: tmp_path / "out"}
    if family == "Qwen2":
        upcycle(tmp_path / "in", tmp_path / "moe", Recipe(experts=8, granularity=4, shared=2, noise=0))
        found["Qwen2Moe"] = tmp_path / "moe"
    for name, model_dir in found.items():
        model, report = getattr(transformers, f"{name}{head}").from_pretrained(
            model_dir, attn_implementation="eager", output_loading_info=True
        )
        assert not report["missing_keys"] | report["unexpected_keys"]
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([PROMPT]))
        for key in {"logits", "start_logits", "end_logits", "last_hidden_state"} & set(expected.keys()):
            torch.testing.assert_close(logits[key], expected[key], atol=1e-4, rtol=0)
