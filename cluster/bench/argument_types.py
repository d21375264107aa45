"""The types of `moe-cluster bench`'s arguments. Imports no torch."""

import argparse
import json
from typing import Any

from cluster.config.speculation import read_speculation
from cluster.errors import SetupError
from cluster.inputs import shown


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between are needed") from None


def drafts(text: str) -> dict[str, Any] | None:
    """Reads a `speculative_config`; None for the word none."""
    if text == "none":
        return None
    try:
        given = json.loads(text)
        read_speculation(given if isinstance(given, dict) else {})
    except (ValueError, RecursionError, SetupError) as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not none or a speculative_config: {error}") from None
    assert isinstance(given, dict), "an empty one has no method"
    return given


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE is needed")
    return name, value


class Names:
    """An argparse type: some of the given names, with commas between."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in self.known:
                raise argparse.ArgumentTypeError(f"{name!r}: known are {', '.join(self.known)}")
        return names
