"""The prompts of a call: one or several, of text or of token ids."""

from cluster.errors import InvalidRequest
from cluster.serving.text.prompts import Prompt

MAX_PROMPTS = 2048  # of one call; OpenAI's limit for embeddings

Prompts = str | list[str] | list[int] | list[list[int]]


def to_prompts(given: Prompts, field: str, adapter: str = "") -> list[Prompt]:
    """One prompt, or several. Numbers side by side are one. adapter: as of `Prompt`.

    Raises InvalidRequest, with the field.
    """
    if isinstance(given, str):
        return [Prompt(text=given, adapter=adapter)]
    if given and isinstance(given[0], int):
        return [Prompt(token_ids=given, adapter=adapter)]  # a body's model has looked at each
    if not 1 <= len(given) <= MAX_PROMPTS:
        raise InvalidRequest(f"{field} has {len(given)} prompts, 1 to {MAX_PROMPTS} are allowed", field)
    return [
        Prompt(text=one, adapter=adapter) if isinstance(one, str) else Prompt(token_ids=one, adapter=adapter)
        for one in given
        if not isinstance(one, int)
    ]
