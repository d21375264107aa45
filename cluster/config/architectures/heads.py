"""The head that a config.json names, as transformers reads it, and its tensors.

The first of `architectures` is the class that wrote the checkpoint; its name is the family's with a head's behind it.
Source: transformers 5.24, PreTrainedConfig, GenericForSequenceClassification, GenericForTokenClassification,
GenericForQuestionAnswering, TextClassificationPipeline. L: labels, H: hidden size, V: vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from cluster.config.architectures.architecture import Shapes
from cluster.config.json_keys import Keys, shown
from cluster.config.model import ModelConfig
from cluster.errors import CheckpointError
from cluster.outcome import Activation, Head, HeadKind

KINDS: Mapping[str, HeadKind] = {
    "ForCausalLM": "causal_lm",
    "Model": "none",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
MAX_LABELS = 1 << 16
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def read_head(keys: Keys, class_name: str) -> Head:
    """class_name: of the family's classes, without a head's name. Raises CheckpointError."""
    kind = _kind(keys, class_name)
    if kind in ("causal_lm", "none"):
        return Head(kind=kind)
    if kind == "question_answering":
        return Head(kind=kind, labels=("start", "end"), has_bias=True)
    if kind == "token_classification":
        return Head(kind=kind, labels=_labels(keys), has_bias=keys.flag("token_classification_bias", True))
    labels, problem, pad = _labels(keys), keys.raw.get("problem_type"), keys.raw.get("pad_token_id")
    if problem is not None and problem not in _PROBLEMS:
        raise CheckpointError(f"config.json: problem_type is {shown(problem)}, one of {', '.join(_PROBLEMS)} is needed")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool)):
        raise CheckpointError(f"config.json: pad_token_id is {shown(pad)}, a whole number is needed")
    return Head(kind=kind, labels=labels, activation=_activation(problem, labels), pad_token_id=pad)


def _activation(problem: str | None, labels: tuple[str, ...]) -> Activation:
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or len(labels) == 1 else "softmax"


def head_shapes(config: ModelConfig) -> Shapes:
    """The head's tensors; none where it is the embeddings."""
    head, hidden = config.head, config.hidden_size
    match head.kind:
        case "none":
            return {}
        case "causal_lm":
            return {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, hidden)}  # [V, H]
    name = "qa_outputs" if head.kind == "question_answering" else "score"
    shapes: Shapes = {f"{name}.weight": (len(head.labels), hidden)}  # [L, H]
    return shapes | ({f"{name}.bias": (len(head.labels),)} if head.has_bias else {})


def _kind(keys: Keys, class_name: str) -> HeadKind:
    """A config without `architectures` is a causal language model's, as most are."""
    given = keys.raw.get("architectures")
    if not given:
        return "causal_lm"
    first = given[0] if isinstance(given, list) else given
    known = {f"{class_name}{head}": kind for head, kind in KINDS.items()}
    if not isinstance(first, str) or first not in known:
        raise CheckpointError(f"config.json: architectures has {shown(first)}, one of {', '.join(known)} is needed")
    return known[first]


def _labels(keys: Keys) -> tuple[str, ...]:
    """The names in `id2label`, whose ids JSON has as texts. Where there are none, or not as many as `num_labels` says,
    that number (by default 2) of LABEL_0, … counts."""
    given: Any = keys.raw.get("id2label")
    names = {} if given is None else _names(given)
    count = keys.count("num_labels", len(names) or 2, at_most=MAX_LABELS)
    if len(names) == count:
        return tuple(names[i] for i in range(count))
    return tuple(f"LABEL_{i}" for i in range(count))


def _names(given: Any) -> dict[int, str]:
    named = {str(label_id): name for label_id, name in given.items()} if isinstance(given, dict) else {}
    in_order = [named.get(str(i)) for i in range(min(len(named), MAX_LABELS + 1))]
    if not 0 < len(in_order) <= MAX_LABELS or not all(isinstance(name, str) for name in in_order):
        raise CheckpointError(
            f"config.json: id2label is {shown(given)}, a text for each id from 0 is needed, {MAX_LABELS:,} at most"
        )
    return {i: str(name) for i, name in enumerate(in_order)}
