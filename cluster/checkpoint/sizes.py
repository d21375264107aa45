"""The parameters of a model and the bytes that its processes hold, from its config alone. Reads no file."""

from dataclasses import dataclass, replace

from cluster.checkpoint.names import dense_bytes
from cluster.config import DTYPE_BYTES, ModelConfig
from cluster.config.quantization import PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """num_parameters: of the whole model, shared embeddings counted once.  num_active_parameters: of these, those that
    one token is multiplied with: all but the routed experts that it is not sent to.

    dense_bytes: what each attention replica holds, rounded or in `dtype`.  expert_bytes: one routed expert of one
    layer, likewise; 0 for a dense model.  kv_bytes_per_token: of a token's keys and values in all layers; cache_dtype:
    of these, as of `EngineConfig.cache_dtype`.
    sliding: of the layers with a window, its tokens and the bytes of one of these; the cache keeps no older ones.
    """

    dtype: str
    num_parameters: int
    num_active_parameters: int
    dense_bytes: int
    expert_bytes: int
    cache_dtype: str
    kv_bytes_per_token: int
    sliding: tuple[tuple[int, int], ...] = ()


def sizes_of(
    config: ModelConfig,
    dtype: str,
    *,
    quantization: str = PLAIN,
    expert_quantization: str = PLAIN,
    cache_dtype: str | None = None,
) -> ModelSizes:
    """dtype: the one to compute in, a key of DTYPE_BYTES.  cache_dtype: as of `EngineConfig.cache_dtype`, None for the
    same.  The others: PLAIN, or of QUANTIZATIONS."""
    item_bytes, num_layers = DTYPE_BYTES[dtype], len(config.sparse_layers)
    plain = replace(config, stored=None)
    stored = dtype if cache_dtype is None else cache_dtype
    of_dense, of_expert = dense_bytes(plain, dtype), plain.expert_bytes(dtype)
    return ModelSizes(
        dtype=dtype,
        num_parameters=(of_dense + num_layers * config.num_experts * of_expert) // item_bytes,
        num_active_parameters=(of_dense + num_layers * config.num_experts_per_tok * of_expert) // item_bytes,
        dense_bytes=dense_bytes(config, dtype, quantization),
        expert_bytes=config.expert_bytes(dtype, expert_quantization),
        cache_dtype=stored,
        kv_bytes_per_token=config.kv_bytes_per_token(stored),
        sliding=tuple(
            (group.window, config.kv_bytes_per_token(stored, len(group.layer_ids)))
            for group in config.layer_groups
            if group.window is not None
        ),
    )
