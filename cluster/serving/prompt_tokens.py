"""A prompt's tokens with their log-probabilities, as a computed result has them. Knows no front."""

from dataclasses import dataclass, replace
from typing import Self

from cluster.errors import Unavailable
from cluster.outcome import Computed
from cluster.types import Logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """T: the prompt's tokens. entries, ranks: [T - 1], of those after the first."""

    token_ids: tuple[int, ...]
    entries: tuple[Logprobs, ...] = ()
    ranks: tuple[int, ...] = ()

    def top(self, num: int) -> "PromptTokens":
        """The same with the `num` likeliest tokens of each position alone."""
        return replace(self, entries=tuple(replace(entry, top=entry.top[:num]) for entry in self.entries))

    @classmethod
    def of(cls, computed: Computed, num_top: int) -> Self:
        """computed: of "token_logprobs" with likeliest tokens, of which the first `num_top` are kept. Raises
        Unavailable where it has none."""
        numbers = computed.numbers.array()
        if numbers.ndim != 2:
            raise Unavailable(
                "the attention replica is of an older version, which gives no likeliest tokens of a prompt: send it "
                "again when `moe-cluster roll` is through"
            )
        width = (numbers.shape[1] - 2) // 2
        entries = tuple(
            Logprobs(
                token_id,
                float(row[0]),
                tuple((int(row[2 + i]), float(row[2 + width + i])) for i in range(min(num_top, width))),
            )
            for token_id, row in zip(computed.prompt_token_ids[1:], numbers, strict=True)
        )
        return cls(token_ids=computed.prompt_token_ids, entries=entries, ranks=tuple(int(row[1]) for row in numbers))
