"""How an engine drafts tokens ahead: the keys of `speculative_config`. Knows no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from cluster import inputs
from cluster.config.options import check, option
from cluster.errors import SetupError

FIELD = "speculative_config"
NGRAM, DRAFT_MODEL = METHODS = ("ngram", "draft_model")
MOST_AHEAD = 64  # far beyond what pays: each is a row of every step that tries it


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """The keys are vLLM's. Raises SetupError for values that cannot work.

    model: of draft_model, a directory or a name, as `ClusterConfig.model`.
    prompt_lookup_max, prompt_lookup_min: tokens at a sequence's end that must have stood in it before: as many as
    possible between the two.
    """

    method: str = option(NGRAM, "", choices=METHODS)
    num_speculative_tokens: int = option(5, "", least=1, most=MOST_AHEAD)
    prompt_lookup_max: int = option(4, "", least=1, most=MOST_AHEAD)
    prompt_lookup_min: int = option(2, "", least=1, most=MOST_AHEAD)
    model: str | None = option(None, "")

    def __post_init__(self) -> None:
        check(self)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise SetupError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, at most prompt_lookup_max "
                f"({self.prompt_lookup_max}) is needed"
            )
        has_model = isinstance(self.model, str) and bool(self.model.strip())
        if self.method == DRAFT_MODEL and not has_model:
            raise SetupError(f"model is {inputs.shown(self.model)}, the draft model's directory or name is needed")
        if self.method == NGRAM and self.model is not None:
            raise SetupError(f"model is {inputs.shown(self.model)}, which is for method draft_model only")


def read_speculation(given: Mapping[str, Any] | None) -> Speculation | None:
    """None for none. Raises SetupError that names the field and the key."""
    if given is None:
        return None
    known = [f.name for f in fields(Speculation)]
    unknown = given.keys() - set(known)
    try:
        if unknown:
            raise SetupError(f"unknown key {inputs.shown(min(unknown))}; known ones: {', '.join(known)}")
        if "method" not in given:
            raise SetupError(f"method is missing: one of {', '.join(METHODS)} is needed")
        return Speculation(**given)
    except SetupError as error:
        raise SetupError(f"{FIELD}: {error}") from None


def with_model(config: Mapping[str, Any] | None, named: Callable[[str], str]) -> Mapping[str, Any] | None:
    """A `speculative_config` with its model's name as `named` gives it."""
    model = config.get("model") if isinstance(config, Mapping) else None
    if config is None or not isinstance(model, str) or not model.strip():
        return config  # what is wrong with it is for `Speculation` to say
    return {**config, "model": named(model)}
