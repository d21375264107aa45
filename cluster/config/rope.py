"""The rotary embedding that a config.json asks for, in the key styles of transformers 4 and 5."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.json_keys import MAX_COUNT, Keys, shown
from cluster.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_TYPES_SERVED = f"{', '.join(ROPE_TYPES[:-1])} and {ROPE_TYPES[-1]} are"
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LISTS = ("short_factor", "long_factor")
_SCALING_KEYS = (
    "factor", "original_max_position_embeddings", *_YARN_KEYS, "low_freq_factor", "high_freq_factor", *_LISTS,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. rope_type: one of ROPE_TYPES.

    original_max_position_embeddings: where "dynamic" and "longrope" begin to stretch.
    attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: YaRN's; the first is LongRoPE's as well.
    low_freq_factor, high_freq_factor: llama3's.  short_factor, long_factor: LongRoPE's, a number for each frequency.
    """

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
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether a token's frequencies depend on the length of its sequence."""
        return self.rope_type in ("dynamic", "longrope")

    def frequency_length(self, num_tokens: int) -> int:
        """Names the frequencies of a token that is new in a sequence of num_tokens: equal numbers, equal frequencies. 0
        is a short sequence's, and everyone's where none vary."""
        if not self.varies or num_tokens <= self.original_max_position_embeddings:
            return 0
        return num_tokens if self.rope_type == "dynamic" else self.original_max_position_embeddings + 1

    def context_length(self, max_position_embeddings: int) -> int:
        """Positions that the model is for. A documented YaRN edit leaves max_position_embeddings as it was.

        Source: vLLM, `_get_and_verify_max_len`: with YaRN factor × original, with linear and dynamic scaling factor ×
        the config's; llama3 and LongRoPE say their longest context as max_position_embeddings.
        """
        if self.rope_type == "yarn":
            return int(self.original_max_position_embeddings * self.factor)
        stretched = self.rope_type in ("linear", "dynamic")
        return int(max_position_embeddings * self.factor) if stretched else max_position_embeddings

    def check(self, head_dim: int) -> None:
        """Raises CheckpointError where heads of that size cannot be rotated like this."""
        for name in _LISTS:
            given = len(getattr(self, name))
            if self.rope_type == "longrope" and given != head_dim // 2:
                raise CheckpointError(
                    f"config.json, rope: {name} has {given} numbers, heads of {head_dim} need {head_dim // 2}"
                )
        if self.rope_type == "dynamic" and head_dim < 4:
            raise CheckpointError(f"config.json: head_dim is {head_dim}, dynamic scaling needs 4 at least")


def read_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Reads `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old), as transformers does.

    A null counts as a missing key. Raises CheckpointError.
    """
    _check_attention(raw)
    merged = _merged(raw)
    keys = Keys(merged, "config.json, rope")
    rope_type = _rope_type(keys)
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"config.json: rope type {shown(rope_type)} is not served: {_TYPES_SERVED}")
    if keys.number("partial_rotary_factor", 1.0) != 1:
        raise CheckpointError("config.json: partial_rotary_factor is not served: only a full rotation is")
    theta = keys.number("rope_theta", 10000.0)
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}, a number above 1 is needed")
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_position_embeddings)
    rope = RopeConfig(theta=theta, rope_type=rope_type, **_scaling(keys, rope_type, max_position_embeddings))
    if rope.context_length(max_position_embeddings) not in range(1, MAX_COUNT):
        raise CheckpointError(
            f"config.json, rope: factor is {rope.factor:g}, a context of 1 to {MAX_COUNT:,} tokens must result"
        )
    return rope


def _scaling(keys: Keys, rope_type: str, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of a RopeConfig that a type reads."""
    if rope_type in ("linear", "dynamic"):  # dynamic scaling looks at max_position_embeddings alone
        return {
            "factor": keys.number("factor"),
            "original_max_position_embeddings": max_position_embeddings,
        }
    original = keys.count("original_max_position_embeddings", max_position_embeddings)
    # DeepSeek's and Phi's configs leave the factor out: they mean the ratio of the two contexts.
    ratio = max_position_embeddings / original
    if rope_type == "llama3":
        implied: float | None = None
        fields: dict[str, Any] = {key: keys.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise CheckpointError("config.json, rope: high_freq_factor must be above low_freq_factor")
    elif rope_type == "longrope":
        implied = ratio
        fields = {key: keys.numbers(key) for key in _LISTS}
        fields |= {key: keys.number(key) for key in ("attention_factor",) if keys.has(key)}
        if original == 1:
            raise CheckpointError("config.json, rope: original_max_position_embeddings is 1, 2 or more is needed")
    else:
        implied = ratio if original != max_position_embeddings else None
        # transformers takes a 0 for "not given" as well, except for attention_factor: with that it computes.
        given = [key for key in _YARN_KEYS if keys.raw.get(key) or (key == "attention_factor" and keys.has(key))]
        fields = {key: keys.number(key) for key in given} | {"truncate": keys.flag("truncate", True)}
    return {"factor": keys.number("factor", implied), "original_max_position_embeddings": original, **fields}


def _check_attention(raw: Mapping[str, Any]) -> None:
    """Raises CheckpointError for an attention that turns far positions by rules of its own."""
    dual = raw.get("dual_chunk_attention_config")
    if dual is None:
        return
    plain = "plain attention gives the same within one chunk (chunk_size - local_size tokens)"
    if isinstance(dual, Mapping):
        chunk_size, local_size = dual.get("chunk_size"), dual.get("local_size")
        if isinstance(chunk_size, int) and isinstance(local_size, int):
            plain = f"plain attention gives the same up to {chunk_size - local_size:,} tokens"
    raise CheckpointError(
        f"config.json: dual chunk attention (dual_chunk_attention_config) is not served; {plain}: take the key out and "
        "set max_position_embeddings to that"
    )


def with_rope_scaling(raw: Mapping[str, Any], rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json with another scaling in place of its own; theta stays unless another is given."""
    given = {key: value for key, value in rope_scaling.items() if value is not None}
    kept: dict[str, Any] = {}
    for old in (raw.get("rope_scaling"), raw.get("rope_parameters")):
        if isinstance(old, Mapping):
            kept |= {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if old.get(key) is not None}
    dropped = ("rope_scaling", *(key for key in ("original_max_position_embeddings",) if key in given))
    return {key: value for key, value in raw.items() if key not in dropped} | {"rope_parameters": kept | given}


def _merged(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_scaling and rope_parameters must be objects")
    for key, value in (*scaling.items(), *parameters.items()):
        if isinstance(value, dict | list) and key not in ("type", "rope_type", *_LISTS):
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
        known = ", ".join(ROPE_TYPES[1:])
        raise CheckpointError(
            f"config.json: rope has {', '.join(given)} and no rope_type: say which it is, one of {known}"
        )
    return "default"
