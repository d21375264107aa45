"""Heads as config.json names them, and the plain maths of their results."""

import json

import numpy as np
import pytest
from configs import config, dense
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from cluster.checkpoint.names import dense_shapes
from cluster.config import read_model_config
from cluster.config.architectures.heads import KINDS
from cluster.errors import CheckpointError, InvalidRequest
from cluster.outcome import CALLS, SERVES, Head
from cluster.serving.outcomes import best_span, probabilities


def head_of(head, family="Qwen2", **changes):
    make = {"Qwen2": dense, "Qwen2Moe": config}[family]
    return read_model_config(make(architectures=[family + head], **changes)).head


@pytest.mark.parametrize("family", ["Qwen2", "Qwen2Moe"])
@pytest.mark.parametrize("name", KINDS)
def test_the_first_class_name_decides(name, family):
    head = head_of(name, family)
    assert head.kind == KINDS[name]
    assert head.generates == (name == "ForCausalLM")


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_classes_is_a_causal_language_models(architectures):
    raw = dense() | {"architectures": architectures}
    assert read_model_config(raw).head == Head()


@pytest.mark.parametrize(
    "architectures",
    [["Qwen2ForTokenGeneration"], ["Qwen2MoeForCausalLM"], ["LlamaForCausalLM"], [None], [["Qwen2Model"]], 5, {"a": 1}],
)
def test_another_class_is_refused_in_one_line_that_lists_what_is_served(architectures):
    with pytest.raises(CheckpointError) as refused:
        read_model_config(dense() | {"architectures": architectures})
    text = str(refused.value)
    assert len(text.splitlines()) == 1
    assert all(f"Qwen2{name}" in text for name in KINDS)


LABELS = [
    {},
    {"num_labels": 5},
    {"id2label": {"0": "a", "1": "b", "2": "c"}},
    {"id2label": {"2": "c", "1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    {"id2label": {"0": "a"}, "num_labels": 1},
    {"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 7},
    {"label2id": {"a": 0, "b": 1, "c": 2}},
]


@pytest.mark.parametrize("changes", LABELS, ids=json.dumps)
@pytest.mark.parametrize("name", ["ForSequenceClassification", "ForTokenClassification"])
def test_labels_are_those_that_transformers_reads(name, changes):
    raw = dense(architectures=["Qwen2" + name], **changes)
    theirs = Qwen2Config.from_dict(json.loads(json.dumps(raw)))
    read = read_model_config(raw)
    assert read.head.labels == tuple(theirs.id2label[i] for i in range(theirs.num_labels))
    assert dense_shapes(read)["score.weight"] == (theirs.num_labels, raw["hidden_size"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 0}, {"num_labels": "2"}, {"num_labels": 10**9}, {"id2label": {}}, {"id2label": ["a"]},
        {"id2label": {"1": "a"}}, {"id2label": {"0": "a", "2": "b"}}, {"id2label": {"0": 1}}, {"id2label": {"x": "a"}},
        {"id2label": "a"}, {"problem_type": "guessing"}, {"problem_type": ["regression"]}, {"pad_token_id": "x"},
        {"pad_token_id": True},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_labels_that_are_none_are_refused_in_one_line_with_the_key(changes):
    with pytest.raises(CheckpointError) as refused:
        head_of("ForSequenceClassification", **changes)
    assert len(str(refused.value).splitlines()) == 1
    assert next(iter(changes)) in str(refused.value)


@pytest.mark.parametrize(
    ("head", "changes", "expected"),
    [
        ("ForCausalLM", {}, {"lm_head.weight": (211, 32)}),
        ("ForCausalLM", {"tie_word_embeddings": True}, {}),
        ("Model", {}, {}),
        ("ForSequenceClassification", {"tie_word_embeddings": True}, {"score.weight": (2, 32)}),
        ("ForTokenClassification", {}, {"score.weight": (2, 32), "score.bias": (2,)}),
        ("ForTokenClassification", {"token_classification_bias": False}, {"score.weight": (2, 32)}),
        ("ForQuestionAnswering", {"num_labels": 7}, {"qa_outputs.weight": (2, 32), "qa_outputs.bias": (2,)}),
    ],
)
def test_a_heads_tensors_are_those_that_transformers_writes(head, changes, expected):
    """Names and shapes of its classes' parameters; test_parity_heads.py reads files of them."""
    shapes = dense_shapes(read_model_config(dense(architectures=["Qwen2" + head], **changes)))
    assert {name: shape for name, shape in shapes.items() if not name.startswith("model.")} == expected


@given(st.lists(st.sampled_from([4, 5, 6]), min_size=1, max_size=8))
def test_a_classified_prompt_ends_where_transformers_pools(token_ids):
    """`(token_indices * non_pad_mask).argmax(-1)`, of the prompt as a batch of one."""
    mask = np.array(token_ids) != 4
    last = int((np.arange(len(token_ids)) * mask).argmax())
    assert Head(pad_token_id=4).classified(tuple(token_ids)) == tuple(token_ids[: last + 1])
    assert Head().classified(tuple(token_ids)) == tuple(token_ids)


NUMBERS = st.floats(-1e4, 1e4, width=32)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_the_best_span_is_that_of_trying_all(pairs):
    starts, ends = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
    first, last = best_span(starts, ends)
    assert first <= last
    assert starts[first] + ends[last] == max(
        starts[i] + ends[j] for i in range(len(pairs)) for j in range(i, len(pairs))
    )


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_probabilities_stay_finite_for_large_logits(logits):
    given = np.array(logits, dtype=np.float32)
    softmax, sigmoid = probabilities(given, "softmax"), probabilities(given, "sigmoid")
    assert softmax.sum() == pytest.approx(1.0, abs=1e-6)
    assert ((sigmoid >= 0) & (sigmoid <= 1)).all()
    assert probabilities(given, "none") is given


def test_every_kind_of_result_has_a_call_and_a_head_that_gives_it():
    assert {wants for served in SERVES.values() for wants in served} == set(CALLS)
    for kind, served in SERVES.items():
        for wants in CALLS:
            if wants in served:
                Head(kind=kind).check_serves(wants)
            else:
                with pytest.raises(InvalidRequest, match=f"not {CALLS[wants]}$"):
                    Head(kind=kind).check_serves(wants)
