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

FAMILIES = {
    "qwen2": DENSE_CONFIGS["qwen2, new key style, tied embeddings, MHA"],
    "qwen2_moe": CONFIGS["released key style, 60 experts"],
}
DTYPES = ("float32", "bfloat16", "float16")
TRANSPORTS = ("local", "stream", "ray")


class Reference:
    """transformers' model of a checkpoint in one dtype: a plain forward pass of each prompt, without a cache."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Tensor:
        """[T, V] float32."""
        logits: Tensor = self.model(torch.tensor([prompt]), use_cache=False).logits[0]
        return logits.float()

    @torch.inference_mode()
    def hidden_states(self, prompt: list[int]) -> Tensor:
        """[T, H] float32, after the last norm."""
        states: Tensor = self.model.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        return states.float()


@dataclass(frozen=True)
class Result:
    """A result of numbers: for each of PROMPTS one tensor, ours and transformers'."""

    ours: Callable[[LLM], list[Tensor]]
    theirs: Callable[[Reference, list[int]], Tensor]


RESULTS: dict[str, Result] = {
    "logits": Result(
        lambda llm: [llm.logits(prompt) for prompt in PROMPTS],
        lambda reference, prompt: reference.logits(prompt),
    ),
    "prompt log-probabilities": Result(
        lambda llm: [found.logprobs for found in llm.prompt_logprobs(PROMPTS)],
        lambda reference, prompt: logprobs_of(prompt, reference.logits(prompt)),
    ),
    "embedding, last token": Result(
        lambda llm: [found.embedding for found in llm.embed(PROMPTS)],
        lambda reference, prompt: F.normalize(reference.hidden_states(prompt)[-1], dim=0),
    ),
    "embedding, mean": Result(
        lambda llm: [found.embedding for found in llm.embed(PROMPTS, pooling="mean", normalize=False)],
        lambda reference, prompt: reference.hidden_states(prompt).mean(dim=0),
    ),
}
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


def raw_config(family: str) -> dict[str, Any]:
    return FAMILIES[family]
