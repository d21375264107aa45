"""Counts the blocks of a KV cache and their bytes. Knows no tensors."""

from cluster.config import DTYPE_BYTES, EngineConfig, ModelConfig
from cluster.errors import SetupError

MIN_BYTES = 64 << 20  # of a cache without a size in the configuration, however little memory is free
UNKNOWN_BYTES = 1 << 30  # of such a cache on a machine whose free memory is unknown


def num_kv_blocks(
    config: ModelConfig, engine: EngineConfig, dtype: str, *, max_model_len: int, room_bytes: int | None, share: float
) -> tuple[int, ...]:
    """Counts the blocks of each group of layers that fit in kv_cache_bytes, by default `share` of room_bytes.

    Every group gets the same number, but never more than max_num_seqs sequences of max_model_len tokens can use: where
    a window slides that is less, and the others share what is left.
    dtype: that of the weights.  room_bytes: memory that is free once all weights are loaded, None if that is unknown.
    Raises SetupError when kv_cache_bytes has no room for one block.
    """
    check_block_fits(config, engine, dtype)
    cache_bytes = engine.kv_cache_bytes
    if cache_bytes is None:
        cache_bytes = UNKNOWN_BYTES if room_bytes is None else max(MIN_BYTES, int(room_bytes * share))
    groups = config.layer_groups
    stored = engine.cache_dtype(dtype)
    block_bytes = [engine.block_size * config.kv_bytes_per_token(stored, len(group.layer_ids)) for group in groups]
    useful = [
        engine.max_num_seqs * most_blocks(group.window, max_model_len, engine.max_num_batched_tokens, engine.block_size)
        for group in groups
    ]
    counts = [0] * len(groups)
    waiting = sorted(range(len(groups)), key=lambda i: useful[i])
    for place, i in enumerate(waiting):
        counts[i] = max(1, min(useful[i], cache_bytes // sum(block_bytes[j] for j in waiting[place:])))
        cache_bytes -= counts[i] * block_bytes[i]
    return tuple(counts)


def check_cache_room(
    config: ModelConfig,
    engine: EngineConfig,
    dtype: str,
    *,
    max_model_len: int,
    machine_bytes: int | None,
    num: int = 1,
) -> None:
    """Raises SetupError where kv_cache_bytes is less than a block, or `num` such caches are more than a whole machine.

    machine_bytes: of memory; None if unknown.
    """
    check_block_fits(config, engine, dtype)
    if engine.kv_cache_bytes is None or machine_bytes is None or not num:
        return
    counts = num_kv_blocks(config, engine, dtype, max_model_len=max_model_len, room_bytes=None, share=1.0)
    stored = engine.cache_dtype(dtype)
    taken = num * sum(
        count * engine.block_size * config.kv_bytes_per_token(stored, len(group.layer_ids))
        for count, group in zip(counts, config.layer_groups, strict=True)
    )
    if taken > machine_bytes:
        caches = "a cache takes" if num == 1 else f"the caches of {num} processes take"
        raise SetupError(
            f"kv_cache_bytes is {engine.kv_cache_bytes}: {caches} {taken / 1e9:.3g} GB, and this machine has "
            f"{machine_bytes / 1e9:.3g} GB: ask for less"
        )


def most_blocks(window: int | None, num_tokens: int, step_tokens: int, block_size: int) -> int:
    """Blocks of one group that a sequence holds at most until it has num_tokens tokens.

    window: as of `ModelConfig.window`.  step_tokens: that a step computes of a sequence at most.
    """
    every = -(-num_tokens // block_size)
    return every if window is None else min(every, -(-(window - 1 + step_tokens) // block_size) + 1)


def check_block_fits(config: ModelConfig, engine: EngineConfig, dtype: str) -> int:
    """Returns the bytes of a block beside weights in `dtype`. Raises SetupError if kv_cache_bytes is less."""
    assert dtype in DTYPE_BYTES
    block_bytes = engine.block_size * config.kv_bytes_per_token(engine.cache_dtype(dtype))
    if engine.kv_cache_bytes is not None and engine.kv_cache_bytes < block_bytes:
        raise SetupError(
            f"kv_cache_bytes is {engine.kv_cache_bytes}, one block of {engine.block_size} tokens takes {block_bytes}: "
            "give more memory or a smaller block_size"
        )
    return block_bytes
