"""The names by which clients ask for the model: its own, its aliases, those of its adapters. Knows no front."""

from collections.abc import Collection

from cluster.errors import NotFound

MAX_SHOWN = 10  # adapters in a refusal


def adapter_of(name: str | None, model_names: Collection[str], adapters: Collection[str]) -> str:
    """The adapter of a name that a request has for its model, "" for the base alone. None asks for the base.

    model_names: the model's, its own first. Raises NotFound for a model that is not served.
    """
    if name is None or name in model_names:
        return ""
    if name in adapters:
        return name
    also = f" and the adapters {', '.join(sorted(adapters)[:MAX_SHOWN])}" if adapters else ""
    model_id = next(iter(model_names))
    raise NotFound(f"the model {name[:100]!r} is not served here: this server has {model_id!r}{also}", "model")
