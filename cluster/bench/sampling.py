"""Named ways to choose tokens, the same for every system of a run. Knows no system.

`SAMPLINGS` has the fixed ones; `find_samplings` adds the checkpoint's own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoint.generation import read_sampling_defaults
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

CHECKPOINT = "checkpoint"
WORDS_FROM = 300  # the first id of `num_words`, which each vocabulary has


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One way to choose tokens. Every system draws from the same distribution: penalties over prompt and output, then
    temperature, top_k, top_p, min_p.

    temperature: 0 is greedy.  top_k: 0 keeps all.  logprobs: None for none, else how many of the likeliest tokens'.
    num_words: of the vocabulary, to which a logit_bias limits answers, so that they repeat themselves; 0 for no limit.
    Other packages' systems have none.
    """

    name: str
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    num_words: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def params(self, num_prompts: int, num_tokens: int) -> list[SamplingParams]:
        """The parameters of each prompt for this package's engine: its seed is its place; EOS ends nothing."""
        shared = replace(
            SAMPLING_DEFAULTS,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            logprobs=self.logprobs,
            logit_bias={WORDS_FROM + i: 100.0 for i in range(self.num_words)},
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        return [replace(shared, seed=seed) for seed in range(num_prompts)]

    def settings(self) -> dict[str, Any]:
        """As other packages' systems get it."""
        return {name: value for name, value in asdict(self).items() if name != "num_words"}

    def describe(self) -> str:
        """Its name and all that is not the default: `top-p (temperature 1, top_p 0.95)`."""
        parts = [] if self.greedy else [f"temperature {self.temperature:g}"]
        for name in ("top_p", "top_k", "min_p", "repetition_penalty", "logprobs", "num_words"):
            if (value := getattr(self, name)) != getattr(GREEDY, name):
                parts.append(f"{name} {value:g}")
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


GREEDY = Sampling(name="greedy")
SAMPLINGS = {
    sampling.name: sampling
    for sampling in (
        GREEDY,
        # As the chat models of the family ship it.
        Sampling(name="chat", temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
        Sampling(name="temperature", temperature=1.0),
        Sampling(name="top-p", temperature=1.0, top_p=0.95),
        Sampling(name="logprobs", logprobs=5),
        Sampling(name="repeating", num_words=16),
        # All guesses are right: what a draft model brings at most, whatever its random weights say.
        Sampling(name="one-word", num_words=1),
    )
}


def find_samplings(names: Sequence[str], model_dir: Path) -> tuple[Sampling, ...]:
    """names: of SAMPLINGS, or CHECKPOINT for what a request without parameters gets from this checkpoint.

    Raises CheckpointError for a generation_config.json with a value out of range.
    """
    return tuple(SAMPLINGS.get(name) or _of_checkpoint(model_dir) for name in names)


def _of_checkpoint(model_dir: Path) -> Sampling:
    params = read_sampling_defaults(model_dir)
    return Sampling(
        name=CHECKPOINT,
        temperature=0.0 if params.greedy else params.temperature or 0.0,
        top_k=params.top_k or 0,
        top_p=params.top_p or 1.0,
        min_p=params.min_p or 0.0,
        repetition_penalty=params.repetition_penalty or 1.0,
    )
