"""The rotary embedding that a config.json asks for, in the key styles of transformers 4 and 5."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.json_keys import MAX_COUNT, Keys, shown
from cluster.errors import CheckpointError

_TYPES = ("default", "linear", "yarn")
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_SCALING_KEYS = ("factor", "original_max_position_embeddings", *_YARN_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `rope_type` is "default", "linear" or "yarn"; the fields below `factor` are YaRN's."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def context_length(self, max_position_embeddings: int) -> int:
        """Positions that the model is for. A documented YaRN edit leaves max_position_embeddings as it was.

        Source: vLLM, `_get_and_verify_max_len`: with YaRN factor × original, with linear scaling factor × the config's.
        """
        if self.rope_type == "yarn":
            return int(self.original_max_position_embeddings * self.factor)
        return int(max_position_embeddings * self.factor)


def read_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Reads `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old), as transformers does.

    A null counts as a missing key. Raises CheckpointError.
    """
    merged = _merged(raw)
    keys = Keys(merged, "config.json, rope")
    rope_type = _rope_type(keys)
    if rope_type not in _TYPES:
        raise CheckpointError(f"config.json: rope type {shown(rope_type)} is not served: default, linear and yarn are")
    if keys.number("partial_rotary_factor", 1.0) != 1:
        raise CheckpointError("config.json: partial_rotary_factor is not served: only a full rotation is")
    theta = keys.number("rope_theta", 10000.0)
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}, a number above 1 is needed")
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_position_embeddings)
    original = keys.count("original_max_position_embeddings", max_position_embeddings)
    # DeepSeek's configs leave YaRN's factor out: they mean the ratio of the two contexts.
    implied = (
        max_position_embeddings / original if rope_type == "yarn" and original != max_position_embeddings else None
    )
    # transformers takes a 0 for "not given" as well, except for attention_factor: with that it computes.
    given = [key for key in _YARN_KEYS if merged.get(key) or (key == "attention_factor" and keys.has(key))]
    rope = RopeConfig(
        theta=theta,
        rope_type=rope_type,
        factor=keys.number("factor", implied),
        original_max_position_embeddings=original,
        truncate=keys.flag("truncate", True),
        **{key: keys.number(key) for key in given},
    )
    if rope.context_length(max_position_embeddings) not in range(1, MAX_COUNT):
        raise CheckpointError(
            f"config.json, rope: factor is {rope.factor:g}, a context of 1 to {MAX_COUNT:,} tokens must result"
        )
    return rope


def _merged(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_scaling and rope_parameters must be objects")
    for key, value in (*scaling.items(), *parameters.items()):
        if isinstance(value, dict | list) and key not in ("type", "rope_type"):
            raise CheckpointError(
                f"config.json: rope has {shown(value)} for {shown(key)}, only one embedding for all layers is served"
            )
    if scaling and parameters and not _renamed(scaling).items() <= _renamed(parameters).items():
        raise CheckpointError(
            "config.json has rope_scaling and rope_parameters, which differ: put everything into rope_parameters"
        )
    merged = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")} | {**scaling, **parameters}
    if raw.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return merged


def _renamed(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under the new keys, without nulls."""
    items = {"rope_type" if key == "type" else key: value for key, value in rope.items() if value is not None}
    return items | {"rope_type": shown(items.get("rope_type"))}  # a list must become hashable


def _rope_type(keys: Keys) -> Any:
    for key in ("rope_type", "type"):
        if keys.has(key):
            return keys.raw[key]
    given = [key for key in _SCALING_KEYS if keys.has(key)]
    if given and keys.raw.get("factor") != 1:
        raise CheckpointError(
            f"config.json: rope has {', '.join(given)} and no rope_type: say which it is, linear or yarn"
        )
    return "default"
