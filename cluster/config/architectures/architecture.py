"""The description of one model family, and the parts of it that families share.

H: hidden size, I: a SwiGLU's inner size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.config.json_keys import Keys, shown
from cluster.config.model import DTYPE_ALIASES, MAX_LAYERS, ModelConfig, MoeConfig, given_dtype
from cluster.config.rope import read_rope
from cluster.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]  # a tensor's name in the checkpoint -> its shape
_LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model family on disk.

    model_type: as its config.json says it.  class_name: of its classes in transformers, without a head's name.
    read: gives the ModelConfig of a config.json. Raises CheckpointError.
    layer_shapes: one layer's tensors without its routed experts, in the order of released files.
    expert_shapes: of a layer and an expert's id, the matrices of one routed expert: gate, up, down. None for a family
        without any.
    """

    model_type: str
    class_name: str
    read: Callable[[Keys], ModelConfig]
    layer_shapes: Callable[[ModelConfig, int], Shapes]
    expert_shapes: Callable[[ModelConfig, int, int], Shapes] | None = None


def read_decoder(
    keys: Keys, model_type: str, *, qkv_bias: bool, layer_types: tuple[str, ...], moe: MoeConfig | None = None
) -> ModelConfig:
    """Reads what all families' configs call by the same keys. Raises CheckpointError."""
    if keys.raw.get("hidden_act") not in (None, "silu"):
        raise CheckpointError(f"config.json: hidden_act is {shown(keys.raw['hidden_act'])}, only 'silu' is served")
    num_heads, hidden_size = keys.count("num_attention_heads"), keys.count("hidden_size")
    dtype = str(given_dtype(keys.raw) or "float32").removeprefix("torch.")
    return ModelConfig(
        model_type=model_type,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers(keys),
        num_attention_heads=num_heads,
        num_key_value_heads=keys.count("num_key_value_heads", num_heads),
        head_dim=keys.count("head_dim", hidden_size // num_heads),
        intermediate_size=keys.count("intermediate_size"),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=read_rope(keys.raw, keys.count("max_position_embeddings")),
        qkv_bias=qkv_bias,
        sliding_window=sliding_window(keys),
        layer_types=layer_types,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        max_position_embeddings=keys.count("max_position_embeddings"),
        dtype=DTYPE_ALIASES.get(dtype, dtype),
        eos_token_ids=keys.ids("eos_token_id"),
        moe=moe,
    )


def num_layers(keys: Keys) -> int:
    return keys.count("num_hidden_layers", at_most=MAX_LAYERS)


def sliding_window(keys: Keys) -> int | None:
    """Tokens that a sliding layer sees; None where the window is off."""
    return keys.count("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None


def read_layer_types(keys: Keys, slides: Callable[[int, int], bool]) -> tuple[str, ...]:
    """`layer_types` if the config has it; else by the family's rule where the window is on. Raises CheckpointError.

    slides: of a layer's id and `max_window_layers`, whether the layer slides.
    """
    window, given = sliding_window(keys), keys.raw.get("layer_types")
    if not given:
        limit = keys.count("max_window_layers", 28, at_least=0) if window is not None else 0
        kinds = (window is not None and slides(layer_id, limit) for layer_id in range(num_layers(keys)))
        return tuple(_LAYER_KINDS[slides] for slides in kinds)
    if not isinstance(given, list) or not all(isinstance(kind, str) and kind in _LAYER_KINDS for kind in given):
        raise CheckpointError(
            f"config.json: layer_types is {shown(given)}, a list of {' and '.join(_LAYER_KINDS)} is needed"
        )
    if "sliding_attention" in given and window is None:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window do not set one"
        )
    return tuple(given)


def attention_shapes(config: ModelConfig, layer_id: int) -> Shapes:
    """Grouped-query attention, with the norms before it and before what follows."""
    prefix, hidden = f"model.layers.{layer_id}", config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {f"{prefix}.input_layernorm.weight": (hidden,)}
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        shapes[f"{prefix}.self_attn.{name}.weight"] = (size, hidden)
        if config.qkv_bias:
            shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
    shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def swiglu_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.up_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.down_proj.weight": (hidden, inner),  # [H, I]
    }
