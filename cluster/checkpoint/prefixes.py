"""Finds the published names of tensors that a tool saved under longer or shorter ones. Reads no files.

A decoder saved without its head has no `model.`; a wrapped one has its wrapper's words before or between its own:
PEFT (`base_model.model.`, `base_layer`), DDP and DeepSpeed (`module`), `torch.compile` (`_orig_mod`), FSDP, activation
checkpointing. A merged adapter leaves nothing else behind. One that is not merged has tensors beside its base, which
stay unknown names.
"""

from collections.abc import Collection

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_DECODER = "model."
_PARTS = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})  # of a decoder; all others lie beside it
_ANCHOR = "layers.0.input_layernorm.weight"  # every checkpoint has it once


def published_names(stored: Collection[str]) -> dict[str, str]:
    """The stored name of each published one. Names stay as they are where it is not clear which they would be."""
    as_they_are = {name: name for name in stored}
    bare = {_without_wrappers(name): name for name in stored}
    found = [name.removesuffix(_ANCHOR) for name in bare if f".{name}".endswith(f".{_ANCHOR}")]
    if len(found) != 1:
        return as_they_are
    decoder = found[0]  # "" or words that end with a dot
    beside = decoder.removesuffix(_DECODER) if f".{decoder}".endswith(f".{_DECODER}") else decoder
    renamed = {_published(name, decoder, beside): stored_name for name, stored_name in bare.items()}
    return renamed if len(renamed) == len(as_they_are) else as_they_are


def _published(name: str, decoder: str, beside: str) -> str:
    if name.startswith(decoder) and name.removeprefix(decoder).partition(".")[0] in _PARTS:
        return _DECODER + name.removeprefix(decoder)
    return name.removeprefix(beside)


def _without_wrappers(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)
