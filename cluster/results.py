"""An `LLM`'s results beside answers of tokens. Knows no engine: `LLM` computes the numbers.

T: tokens of a prompt, H: hidden size, V: vocabulary, L: labels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.outcome import Computed, Head, Wants
from cluster.serving.outcomes import best_span, probabilities, unit_vector
from cluster.serving.text.prompts import OneAdapter, Prompt, to_prompts, with_adapter

OnePrompt = str | Iterable[int] | Mapping[str, Any]
_POOLINGS: Mapping[str, Wants] = {"last": "last_hidden_state", "mean": "mean_hidden_state"}
Prompts = OnePrompt | Iterable[OnePrompt]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classification:
    """logits, probs: [L] float32; probs sum to one, or are one by one for several labels at a time, and for a
    regression they are the logits.  label: the likeliest one's name.
    prompt_token_ids: without the padding behind them."""

    prompt_token_ids: tuple[int, ...]
    logits: Tensor
    probs: Tensor
    label: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenClassification:
    """logits: [T, L] float32.  labels: [T], each token's likeliest one's name."""

    prompt_token_ids: tuple[int, ...]
    logits: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerSpan:
    """start_logits, end_logits: [T] float32.  start, end: positions in prompt_token_ids of the best answer's first and
    last token: of all spans, that with the largest sum of both logits."""

    prompt_token_ids: tuple[int, ...]
    start_logits: Tensor
    end_logits: Tensor
    start: int
    end: int


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

    def logits_of(self, hidden_states: Tensor, adapter: str = "") -> Tensor: ...

    @property
    def head(self) -> Head: ...


class Results(Computes, Protocol):
    """All calls take prompts as `LLM.generate` does, several at once, and raise as it does; an error's `outputs` are
    `Computed`, None for a prompt that failed. A prompt may be as long as the context.

    adapter: as of `LLM.generate`."""

    def logits(self, token_ids: Iterable[int], *, adapter: str = "") -> Tensor:
        """The logits at every position of a prompt: [T, V] float32. Computed in chunks, as a prompt would be.

        Raises InvalidRequest, Unavailable, Closed.
        """
        self.head.check_serves("tokens")
        [prompt] = with_adapter([Prompt(token_ids=() if token_ids is None else token_ids)], adapter)
        [computed] = self.compute([prompt], "hidden_states")
        return self.logits_of(_tensor(computed), prompt.adapter)

    def prompt_logprobs(self, prompts: Prompts, *, adapter: OneAdapter = "") -> list[PromptLogprobs]:
        """The log-probability of each token of a prompt, given those before it. No more than a chunk's logits are held
        at a time."""
        return [
            PromptLogprobs(prompt_token_ids=computed.prompt_token_ids, logprobs=_tensor(computed))
            for computed in self.compute(to_prompts(prompts, adapter), "token_logprobs")
        ]

    def classify(self, prompts: Prompts, *, adapter: OneAdapter = "") -> list[Classification]:
        """Labels for whole prompts, by a checkpoint of a `ForSequenceClassification` class: those of a prompt's last
        token that is not the config's pad_token_id."""
        found = []
        for computed in self.compute(to_prompts(prompts, adapter), "label_logits"):
            logits = computed.numbers.array()
            probs = probabilities(logits, self.head.activation)
            found.append(
                Classification(
                    prompt_token_ids=computed.prompt_token_ids,
                    logits=torch.from_numpy(logits),
                    probs=torch.from_numpy(probs),
                    label=self.head.labels[int(logits.argmax())],
                )
            )
        return found

    def classify_tokens(self, prompts: Prompts, *, adapter: OneAdapter = "") -> list[TokenClassification]:
        """Labels for each token, by a checkpoint of a `ForTokenClassification` class."""
        found = []
        for computed in self.compute(to_prompts(prompts, adapter), "token_label_logits"):
            logits = _tensor(computed)
            labels = tuple(self.head.labels[i] for i in logits.argmax(dim=-1).tolist())
            found.append(TokenClassification(prompt_token_ids=computed.prompt_token_ids, logits=logits, labels=labels))
        return found

    def answer_spans(self, prompts: Prompts, *, adapter: OneAdapter = "") -> list[AnswerSpan]:
        """Where an answer stands in a prompt of a question and its context, by a checkpoint of a
        `ForQuestionAnswering` class. The span may lie anywhere in the prompt."""
        found = []
        for computed in self.compute(to_prompts(prompts, adapter), "span_logits"):
            starts, ends = np.ascontiguousarray(computed.numbers.array().T)
            start, end = best_span(starts, ends)
            found.append(
                AnswerSpan(
                    prompt_token_ids=computed.prompt_token_ids,
                    start_logits=torch.from_numpy(starts),
                    end_logits=torch.from_numpy(ends),
                    start=start,
                    end=end,
                )
            )
        return found

    def embed(
        self, prompts: Prompts, *, pooling: str = "last", normalize: bool = True, adapter: OneAdapter = ""
    ) -> list[Embedding]:
        """A vector for each prompt: the hidden state of its last token after the model's last norm, or all tokens'
        mean. Neither a template nor an EOS is added.

        pooling: "last" or "mean".  normalize: divides it by its Euclidean length.
        """
        if pooling not in _POOLINGS:
            raise InvalidRequest(f"pooling is {inputs.shown(pooling)}, {' or '.join(_POOLINGS)} is needed", "pooling")
        scale = inputs.truth_value(normalize, "normalize")
        found = []
        for computed in self.compute(to_prompts(prompts, adapter), _POOLINGS[pooling]):
            vector = computed.numbers.array()
            vector = unit_vector(vector) if scale else vector
            found.append(Embedding(prompt_token_ids=computed.prompt_token_ids, embedding=torch.from_numpy(vector)))
        return found


def _tensor(computed: Computed) -> Tensor:
    return torch.from_numpy(computed.numbers.array())
