"""The rows and columns of the parity table: family × result × dtype × transport. docs/models.md shows it.

A result of another head is a line in RESULTS: what `LLM` gives for it, and what transformers does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from configs import CONFIGS, DENSE_CONFIGS, PROMPTS
from parity_tools import logprobs_of
from torch import Tensor

from cluster import LLM
from cluster.config.architectures.registry import ARCHITECTURES

FAMILIES = {
    "qwen2": DENSE_CONFIGS["qwen2, new key style, tied embeddings, MHA"],
    "qwen2_moe": CONFIGS["released key style, 60 experts"],
}
DTYPES = ("float32", "bfloat16", "float16")
RANKS = "2 ranks"  # that share the dense half, with the experts at the first
ADAPTER, DIVIDED_ADAPTER = "LoRA", "LoRA, 2 ranks"  # in one process, against the model with the adapter merged
TRANSPORTS = ("local", "stream", "ray", RANKS, ADAPTER, DIVIDED_ADAPTER)
ADAPTED = (ADAPTER, DIVIDED_ADAPTER)

PAD = 4  # behind a prompt it is padding: the last token before it counts for a sequence's label
LABELS = {"0": "bad", "1": "good", "2": "neither"}


def class_of(family: str, head: str) -> Any:
    """transformers' class. head: its name behind the family's, as `ForCausalLM`."""
    import transformers

    return getattr(transformers, f"{ARCHITECTURES[family].class_name}{head}")


def raw_config(family: str, head: str) -> dict[str, Any]:
    name = class_of(family, head).__name__
    return {**FAMILIES[family], "architectures": [name], "id2label": LABELS, "pad_token_id": PAD}


class Reference:
    """transformers' model of a checkpoint in one dtype: a plain forward pass of each prompt, without a cache."""

    def __init__(self, model_dir: Path, head: str, dtype: str) -> None:
        import transformers

        kind = getattr(transformers, f"AutoModel{head}")
        self.model = kind.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), attn_implementation="eager", use_cache=False
        ).eval()

    @torch.inference_mode()
    def __call__(self, prompt: list[int]) -> Any:
        return self.model(torch.tensor([prompt]))

    def logits(self, prompt: list[int]) -> Tensor:
        """[T, V], or [L] or [T, L] of labels, float32."""
        logits: Tensor = self(prompt).logits[0]
        return logits.float()

    @torch.inference_mode()
    def hidden_states(self, prompt: list[int]) -> Tensor:
        """[T, H] float32, after the last norm."""
        states: Tensor = self.model.base_model(torch.tensor([prompt])).last_hidden_state[0]
        return states.float()


@dataclass(frozen=True)
class Result:
    """A result of numbers: for each of PROMPTS one tensor, ours, with an adapter or "", and transformers'.
    head: whose checkpoint gives it."""

    ours: Callable[[LLM, str], list[Tensor]]
    theirs: Callable[[Reference, list[int]], Tensor]
    head: str = "ForCausalLM"


RESULTS: dict[str, Result] = {
    "logits": Result(
        lambda llm, name: [llm.logits(prompt, adapter=name) for prompt in PROMPTS],
        lambda reference, prompt: reference.logits(prompt),
    ),
    "prompt log-probabilities": Result(
        lambda llm, name: [found.logprobs for found in llm.prompt_logprobs(PROMPTS, adapter=name)],
        lambda reference, prompt: logprobs_of(prompt, reference.logits(prompt)),
    ),
    "embedding, last token": Result(
        lambda llm, name: [found.embedding for found in llm.embed(PROMPTS, adapter=name)],
        lambda reference, prompt: F.normalize(reference.hidden_states(prompt)[-1], dim=0),
    ),
    "embedding, mean": Result(
        lambda llm, name: [
            found.embedding for found in llm.embed(PROMPTS, pooling="mean", normalize=False, adapter=name)
        ],
        lambda reference, prompt: reference.hidden_states(prompt).mean(dim=0),
    ),
    "labels of a sequence": Result(
        lambda llm, name: [found.logits for found in llm.classify(PROMPTS, adapter=name)],
        lambda reference, prompt: reference.logits(prompt),
        "ForSequenceClassification",
    ),
    "labels of tokens": Result(
        lambda llm, name: [found.logits for found in llm.classify_tokens(PROMPTS, adapter=name)],
        lambda reference, prompt: reference.logits(prompt),
        "ForTokenClassification",
    ),
    "span of an answer": Result(
        lambda llm, name: [
            torch.stack([found.start_logits, found.end_logits]) for found in llm.answer_spans(PROMPTS, adapter=name)
        ],
        lambda reference, prompt: spans(reference(prompt)),
        "ForQuestionAnswering",
    ),
}


def spans(outputs: Any) -> Tensor:
    """[2, T] float32: of an answer's first and last token."""
    return torch.stack([outputs.start_logits[0], outputs.end_logits[0]]).float()


TOKENS = "greedy tokens"
HEADS = (TOKENS, *RESULTS)

Cell = tuple[str, str, str, str]
CELLS: list[Cell] = [
    (family, head, dtype, transport)
    for family in FAMILIES
    for head in HEADS
    for dtype in DTYPES
    for transport in TRANSPORTS
]


def cell_id(cell: Cell) -> str:
    return "-".join(cell)


def table() -> str:
    """Markdown: a row for each family, result and dtype, a column for each transport."""
    lines = [f"| family | result | dtype | {' | '.join(TRANSPORTS)} |", "| --- " * (3 + len(TRANSPORTS)) + "|"]
    for family in FAMILIES:
        for head in HEADS:
            for dtype in DTYPES:
                cells = ["=" if dtype == "float32" else "≈"] * len(TRANSPORTS)
                lines.append(f"| {family} | {head} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
