"""Sampling parameters' values, checked: types, ranges, sizes. Knows no request.

Every function raises InvalidRequest, with the field's name, and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster import inputs
from cluster.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20  # the OpenAI API's limit
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256  # the detokenizer holds back up to this much text while a match is open
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKEN_IDS = 1 << 18  # more than any served vocabulary has: Qwen2's has 151,936


@dataclass(frozen=True, slots=True)
class Limits:
    """The closed (or, with `above`, half-open) range of one numeric field."""

    name: str
    low: float
    high: float
    above: bool = False
    integer: bool = False

    def checked(self, value: Any) -> float | None:
        """Returns the value as an int or a float of Python. Raises InvalidRequest."""
        if value is None:
            return None
        plain = inputs.whole_number(value, self.name) if self.integer else inputs.number(value, self.name)
        if not (self.low < plain if self.above else self.low <= plain) or not plain <= self.high:
            low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
            high = str(self.high) if self.integer else f"{self.high:g}"
            raise InvalidRequest(
                f"{self.name} is {inputs.shown(plain)}, it must be {low} and at most {high}", self.name
            )
        return plain


def stop_strings(given: Any) -> tuple[str, ...]:
    stop = inputs.texts(given, "stop", MAX_STOP_STRINGS)
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequest(
                f"stop has a string of {len(text)} characters, 1 to {MAX_STOP_STRING_CHARS} are allowed", "stop"
            )
    return stop


def stop_token_ids(given: Any) -> tuple[int, ...]:
    ids = inputs.token_ids(given, "stop_token_ids", MAX_STOP_TOKEN_IDS)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} ids", "stop_token_ids")
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < 2**31:
        return ids  # the usual case, and fast: 2^18 ids take 4 ms, one by one 120
    limits = Limits("stop_token_ids", 0, 2**31 - 1, integer=True)  # of any vocabulary; the model's is known later
    return tuple(int(limits.checked(token_id) or 0) for token_id in ids)


def logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    pairs = given.items() if isinstance(given, Mapping) else () if given is None else given
    are_pairs = isinstance(given, Mapping) or pairs == () or (
        isinstance(pairs, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    )  # fmt: skip
    if not are_pairs:
        raise InvalidRequest(
            f"logit_bias is {inputs.shown(given)}, an object of token ids and numbers is needed", "logit_bias"
        )
    if len(pairs) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            f"logit_bias has {len(pairs)} tokens, at most {MAX_BIASED_TOKENS} are allowed", "logit_bias"
        )
    ids, values = Limits("logit_bias", 0, 2**31 - 1, integer=True), Limits("logit_bias", -100.0, 100.0)
    plain = [(ids.checked(token_id), values.checked(value)) for token_id, value in pairs]
    for token_id, value in plain:
        if token_id is None or value is None:
            raise InvalidRequest("logit_bias has a null, token ids and numbers are needed", "logit_bias")
    return tuple(sorted({int(token_id or 0): value or 0.0 for token_id, value in plain}.items()))


LIMITS = (
    Limits("temperature", 0.0, 100.0),
    Limits("top_k", 0, 2**31 - 1, integer=True),
    Limits("top_p", 0.0, 1.0, above=True),
    Limits("min_p", 0.0, 1.0),
    Limits("repetition_penalty", 0.0, 100.0, above=True),
    Limits("presence_penalty", -2.0, 2.0),
    Limits("frequency_penalty", -2.0, 2.0),
    Limits("seed", 0, 2**63 - 1, integer=True),
    Limits("max_tokens", 1, 2**31 - 1, integer=True),
    Limits("min_tokens", 0, 2**31 - 1, integer=True),
    Limits("logprobs", 0, MAX_TOP_LOGPROBS, integer=True),
)
