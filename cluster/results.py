"""An `LLM`'s results beside answers of tokens. Knows no engine: `LLM` computes the numbers.

T: tokens of a prompt, H: hidden size, V: vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.outcome import Computed, Wants
from cluster.serving.outcomes import unit_vector
from cluster.serving.text.prompts import Prompt, to_prompts

OnePrompt = str | Iterable[int] | Mapping[str, Any]
_POOLINGS: Mapping[str, Wants] = {"last": "last_hidden_state", "mean": "mean_hidden_state"}
Prompts = OnePrompt | Iterable[OnePrompt]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """embedding: [H] float32."""

    prompt_token_ids: tuple[int, ...]
    embedding: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptLogprobs:
    """logprobs: [T - 1] float32, the natural logarithm of each prompt token's probability after those before it; the
    first one has none."""

    prompt_token_ids: tuple[int, ...]
    logprobs: Tensor


class Computes(Protocol):
    """Computes results of numbers. A mixin's other half: `LLM` has it."""

    def compute(self, prompts: list[Prompt], wants: Wants) -> list[Computed]: ...

    def logits_of(self, hidden_states: Tensor) -> Tensor: ...


class Results(Computes, Protocol):
    """All calls take prompts as `LLM.generate` does, several at once, and raise as it does; an error's `outputs` are
    `Computed`, None for a prompt that failed. A prompt may be as long as the context."""

    def logits(self, token_ids: Iterable[int]) -> Tensor:
        """The logits at every position of a prompt: [T, V] float32. Computed in chunks, as a prompt would be.

        Raises InvalidRequest, Unavailable, Closed.
        """
        [computed] = self.compute([Prompt(token_ids=() if token_ids is None else token_ids)], "hidden_states")
        return self.logits_of(_tensor(computed))

    def prompt_logprobs(self, prompts: Prompts) -> list[PromptLogprobs]:
        """The log-probability of each token of a prompt, given those before it. No more than a chunk's logits are held
        at a time."""
        return [
            PromptLogprobs(prompt_token_ids=computed.prompt_token_ids, logprobs=_tensor(computed))
            for computed in self.compute(to_prompts(prompts), "token_logprobs")
        ]

    def embed(self, prompts: Prompts, *, pooling: str = "last", normalize: bool = True) -> list[Embedding]:
        """A vector for each prompt: the hidden state of its last token after the model's last norm, or all tokens'
        mean. Neither a template nor an EOS is added.

        pooling: "last" or "mean".  normalize: divides it by its Euclidean length.
        """
        if pooling not in _POOLINGS:
            raise InvalidRequest(f"pooling is {inputs.shown(pooling)}, {' or '.join(_POOLINGS)} is needed", "pooling")
        scale = inputs.truth_value(normalize, "normalize")
        found = []
        for computed in self.compute(to_prompts(prompts), _POOLINGS[pooling]):
            vector = computed.numbers.array()
            vector = unit_vector(vector) if scale else vector
            found.append(Embedding(prompt_token_ids=computed.prompt_token_ids, embedding=torch.from_numpy(vector)))
        return found


def _tensor(computed: Computed) -> Tensor:
    return torch.from_numpy(computed.numbers.array())
