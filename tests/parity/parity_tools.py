"""The oracle of the parity tests: transformers' model of the family on the same checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configs import NUM_TOKENS, PROMPTS
from torch import Tensor


@dataclass(frozen=True)
class Oracle:
    """logits: [T, vocab] of each prompt.  token_ids: greedy continuations of NUM_TOKENS tokens."""

    model_dir: Path
    logits: list[Tensor]
    token_ids: list[list[int]]


def ask_transformers(model_dir: Path) -> Oracle:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    return ask(model, model_dir)


def ask(model: Any, model_dir: Path) -> Oracle:
    """model: transformers', of the checkpoint, or made of it."""
    logits, token_ids = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            logits.append(model(torch.tensor([prompt])).logits[0])
            ids = list(prompt)
            for _ in range(NUM_TOKENS):  # no cache and no generate(): the plain definition
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            token_ids.append(ids[len(prompt) :])
    return Oracle(model_dir, logits, token_ids)


def ask_peft(model_dir: Path, directory: Path, **config) -> Oracle:
    """Writes an adapter of random matrices with PEFT, and asks the model that PEFT merges it into."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(str(config)))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(directory)
    return ask(model.merge_and_unload().eval(), model_dir)


def logprobs_of(prompt: list[int], logits: Tensor) -> Tensor:
    """[T - 1]: of each prompt token after the first, given those before it. logits: [T, vocab]."""
    return logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0]


def greedy_margin(oracle: Oracle) -> float:
    """The least distance between best and second logit over the prompts' last positions."""
    return min(float(logits[-1].topk(2).values.diff().abs()) for logits in oracle.logits)
