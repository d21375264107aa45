"""A prompt; and the shapes in which callers of vLLM pass prompts and sampling parameters to the offline API.

Knows no tokenizer and no model. Every function raises InvalidRequest and nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from cluster import inputs
from cluster.conversation import Conversation
from cluster.errors import InvalidRequest
from cluster.types import SamplingParams

OneParams = SamplingParams | Mapping[str, Any]
OneAdapter = str | Iterable[str]
_TEXT, _TOKEN_IDS = "prompt", "prompt_token_ids"  # the keys of vLLM's TextPrompt and TokensPrompt
_WANTED = "a text, token ids, or a list of these"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The input of a request: exactly one of a text, token ids or a conversation. Raises InvalidRequest.

    adapter: the name of the one that computes it; "" for the base alone.
    continue_from: the answer's tokens that its client has already; it goes on with the next one.
    """

    text: str | None = None
    token_ids: Iterable[int] | None = None
    chat: Conversation | None = None
    adapter: str = ""
    continue_from: Sequence[int] = ()

    def __post_init__(self) -> None:
        values = {"text": self.text, "token_ids": self.token_ids, "chat": self.chat}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "empty"
            raise InvalidRequest(f"input is {found}, exactly one of text, token_ids and chat is needed", "input")

    @property
    def field(self) -> str:
        """Returns the given input's name in the public API."""
        return "text" if self.text is not None else "token_ids" if self.token_ids is not None else "chat"


def to_prompts(given: Any, adapter: Any = "") -> list[Prompt]:
    """Reads one prompt, or a collection of them: texts, token ids in any list, array or tensor, vLLM's mappings.

    Whole numbers side by side are one prompt, as in vLLM; so are the numbers of a one-dimensional array.
    adapter: as of `with_adapter`.
    """
    return with_adapter(_to_prompts(given), adapter)


def with_adapter(prompts: list[Prompt], given: Any) -> list[Prompt]:
    """given: the name of the adapter for all, "" for none, or a list with one for each prompt."""
    if isinstance(given, str) or not inputs.is_series(given):
        names = [given] * len(prompts)
    else:
        names = list(islice(given, len(prompts) + 1))
    if len(names) != len(prompts):
        raise InvalidRequest(f"adapter has another number of names than the {len(prompts)} prompts", "adapter")
    names = ["" if name is None else inputs.text(name, "adapter") for name in names]
    return [replace(prompt, adapter=name) if name else prompt for prompt, name in zip(prompts, names, strict=True)]


def _to_prompts(given: Any) -> list[Prompt]:
    if isinstance(given, str | Mapping):
        return [_to_prompt(given, "prompts")]
    given = inputs.listed(given)
    if not inputs.is_series(given):
        raise InvalidRequest(f"prompts is {inputs.shown(given)}, {_WANTED} is needed", "prompts")
    parts = iter(given)
    first = list(islice(parts, 1))
    if first and inputs.is_whole_number(first[0]):
        return [Prompt(token_ids=given if isinstance(given, Sequence) else chain(first, parts))]
    return [_to_prompt(part, f"prompts[{position}]") for position, part in enumerate(chain(first, parts))]


def to_params(given: Any, num_prompts: int) -> list[SamplingParams]:
    """Returns one for each prompt. given: one for all, a list, or None; mappings have the fields' names."""
    if given is None or isinstance(given, SamplingParams | Mapping):
        return [_to_params(given)] * num_prompts
    if not inputs.is_series(given):
        raise InvalidRequest(f"params is {inputs.shown(given)}, SamplingParams or a list of them is needed", "params")
    every = [_to_params(one) for one in islice(given, num_prompts + 1)]  # an iterator may have no end
    if len(every) != num_prompts:
        found = (
            len(given)
            if isinstance(given, Sized)
            else f"more than {num_prompts}"
            if len(every) > num_prompts
            else len(every)
        )
        raise InvalidRequest(f"{found} SamplingParams for {num_prompts} prompts", "params")
    return every


def _to_params(given: Any) -> SamplingParams:
    if given is None:
        return SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    if isinstance(given, Mapping):
        return SamplingParams.from_mapping(given)
    raise InvalidRequest(f"params has {inputs.shown(given)}, SamplingParams are needed", "params")


def _to_prompt(given: Any, field: str) -> Prompt:
    if isinstance(given, str):
        return Prompt(text=given)
    if isinstance(given, Mapping):
        return _of_mapping(given, field)
    ids = inputs.listed(given)
    if not inputs.is_series(ids):
        raise InvalidRequest(f"{field} is {inputs.shown(given)}, a text or token ids are needed", field)
    return Prompt(token_ids=ids)


def _of_mapping(given: Mapping[Any, Any], field: str) -> Prompt:
    """Reads a TokensPrompt (its text is only for the record) or a TextPrompt."""
    unknown = [key for key, value in given.items() if key not in (_TEXT, _TOKEN_IDS) and value is not None]
    if unknown:
        raise InvalidRequest(f"{field} has {inputs.shown(unknown[0])}, which this model has no use for", field)
    if given.get(_TOKEN_IDS) is not None:
        return Prompt(token_ids=given[_TOKEN_IDS])
    text = given.get(_TEXT)
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} has neither a text as {_TEXT!r} nor ids as {_TOKEN_IDS!r}", field)
    return Prompt(text=text)
