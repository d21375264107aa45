"""The prompts of a call: one or several, of text or of token ids."""

from cluster.serving.text.prompts import Prompt

Prompts = str | list[str] | list[int] | list[list[int]]


def to_prompts(given: Prompts) -> list[Prompt]:
    """One prompt, or several. Numbers side by side are one. Raises InvalidRequest."""
    if isinstance(given, str):
        return [Prompt(text=given)]
    if given and isinstance(given[0], int):
        return [Prompt(token_ids=[one for one in given if isinstance(one, int)])]
    return [Prompt(text=one) if isinstance(one, str) else Prompt(token_ids=one) for one in given
            if not isinstance(one, int)]  # fmt: skip
