"""Checkpoints with heads, as transformers writes them, against transformers in float32: each family, each head.

Prompts of mixed lengths, some with padding in them, as they are, in chunks beside one another, and from a cache.
test_parity_matrix.py has each head in each dtype over each transport.
"""

import math
import shutil

import pytest
import torch
from configs import PROMPTS
from head_tools import HEADS, PAD, PADDED, SETTINGS, check, close, llm_for
from safetensors.torch import load_file, save_file

from cluster.checkpoint.names import dense_bytes
from cluster.checkpoint.opening import open_checkpoint
from cluster.errors import InvalidRequest, NonFiniteOutput

WAYS = {
    "as they are": {},
    "in chunks of 5": {"max_num_batched_tokens": 5},
    "from a cache": {"block_size": 4},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way == "in chunks of 5" else []) for way in WAYS]
)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", SETTINGS)
def test_each_head_gives_what_transformers_gives(written, family, head, way):
    oracle = written(family, head)
    with llm_for(oracle.model_dir, **WAYS[way]) as llm:
        for _ in range(2 if way == "from a cache" else 1):
            check(llm, oracle, head)
        assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id2label": {"0": "only"}}, "sigmoid"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"id2label": {"0": "only"}, "problem_type": "regression"}, "none"),
        ({"problem_type": "single_label_classification"}, "softmax"),
    ],
)
def test_probabilities_are_those_of_transformers_pipeline(written, changes, expected):
    """Its own functions, and its choice among them (`TextClassificationPipeline.postprocess`)."""
    from transformers.pipelines import text_classification as pipeline

    oracle = written("Qwen2", "ForSequenceClassification", **changes)
    with llm_for(oracle.model_dir) as llm:
        for prompt, found in zip(PROMPTS, llm.classify(PROMPTS), strict=True):
            logits = oracle(prompt).logits[0].numpy()
            function = {"sigmoid": pipeline.sigmoid, "softmax": pipeline.softmax, "none": lambda x: x}[expected]
            close(found.probs, torch.from_numpy(function(logits)))
            assert found.label == oracle.model.config.id2label[int(logits.argmax())]


def test_without_a_pad_token_the_last_token_counts(written):
    oracle = written("Qwen2", "ForSequenceClassification", pad_token_id=None)
    with llm_for(oracle.model_dir) as llm:
        for prompt, found in zip(PADDED, llm.classify(PADDED), strict=True):
            close(found.logits, oracle(prompt).logits[0])


@pytest.mark.parametrize("family", SETTINGS)
def test_prompts_padded_to_one_batch_get_the_labels_of_transformers_batch(written, family):
    """Padding behind prompts, as its pipelines send them, with the attention mask that they send along; and the
    prompts alone, one of them with the pad token inside."""
    oracle = written(family, "ForSequenceClassification")
    prompts = [*PROMPTS, [7, PAD, 8]]
    longest = max(map(len, prompts))
    padded = [prompt + [PAD] * (longest - len(prompt)) for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    with torch.inference_mode():
        expected = oracle.model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits
    with llm_for(oracle.model_dir) as llm:
        for given in (padded, prompts):
            found = llm.classify(given)
            close(torch.stack([one.logits for one in found]), expected)
            assert [one.prompt_token_ids for one in found] == [tuple(prompt) for prompt in prompts]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_refuses_the_other_heads_results_by_name(written, head):
    calls = {
        "generate": "Generate", "logits": "Generate", "prompt_logprobs": "Score", "classify": "Classify",
        "classify_tokens": "ClassifyTokens", "answer_spans": "AnswerSpan",
    }  # fmt: skip
    mine = {HEADS[1]: "classify", HEADS[2]: "classify_tokens", HEADS[3]: "answer_spans"}.get(head)
    answers = "Embed" if mine is None else f"{calls[mine]} and Embed"
    with llm_for(written("Qwen2", head).model_dir) as llm:
        for method, name in calls.items():
            if method == mine:
                continue
            with pytest.raises(InvalidRequest, match=f"it answers {answers}, not {name}$") as refused:
                getattr(llm, method)([1, 2, 3])
            assert len(str(refused.value).splitlines()) == 1
        assert not llm.engine.has_work


def test_a_causal_model_refuses_labels(oracle_of):
    with llm_for(oracle_of("qwen2, released key style").model_dir) as llm:
        for method in ("classify", "classify_tokens", "answer_spans"):
            with pytest.raises(InvalidRequest, match="a head for next tokens: it answers Generate, Score and Embed"):
                getattr(llm, method)([1, 2, 3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_whose_numbers_are_none_ends_its_requests_and_no_embedding(written, tmp_path, value):
    source = written("Qwen2", "ForTokenClassification").model_dir
    shutil.copytree(source, tmp_path / "broken")
    stored = load_file(source / "model.safetensors")
    stored["score.weight"][1] = value
    save_file(stored, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with llm_for(tmp_path / "broken") as llm:
        with pytest.raises(NonFiniteOutput):
            llm.classify_tokens([[1, 2, 3]])
        assert llm.embed([[1, 2, 3]])[0].embedding.isfinite().all()


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_a_plans_bytes_are_those_of_the_file_without_its_experts(written, family, head):
    oracle = written(family, head)
    held = sum(w.numel() * 4 for name, w in oracle.model.named_parameters() if ".experts." not in name)
    assert dense_bytes(open_checkpoint(oracle.model_dir).config, "float32") == held
