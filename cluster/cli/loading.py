"""Shows that a command asks the hub about a model, or loads one in its own process."""

from contextlib import AbstractContextManager, nullcontext

from cluster.checkpoint.model_files import hub_name


def loading(model: str) -> AbstractContextManager[object]:
    """Around the making of an `LLM`. A model of the hub shows its downloads itself."""
    return nullcontext() if hub_name(model) else _working(f"loading {model} …")


def asking(model: str) -> AbstractContextManager[object]:
    """Around questions to the hub, in which nothing is downloaded."""
    return _working(f"asking the hub about {model} …") if hub_name(model) else nullcontext()


def _working(words: str) -> AbstractContextManager[object]:
    from cluster.console import Working  # rich loads with it: not for --help

    return Working(words)
