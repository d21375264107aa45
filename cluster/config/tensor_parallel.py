"""The part of a model that one of several processes computes: a rank of tensor parallelism. Knows no tensors.

A rank has some query heads and the key/value heads that these read, and a part of each SwiGLU's inner size and of the
vocabulary. Where there are fewer key/value heads than ranks, several ranks have a copy of the same one.
Source: Shoeybi et al., Megatron-LM, section 3; the vocabulary as there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.config.engine import EngineConfig
from cluster.config.model import ModelConfig
from cluster.errors import SetupError
from cluster.outcome import Head

FIELD = "tensor_parallel_size"
# An inner size is cut where rows stay aligned, 128 bytes in 8 bits, as long as no rank gets an eighth more by that.
_UNITS = (128, 64, 32, 16, 8, 4, 2)
_UNITS_EACH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of one rank, from 0, of `size`. heads: of queries.  inner: of dense layers.  shared_inner: of the shared expert.
    tokens: of the vocabulary, which has vocab_size.  config: of a model that is this part alone; only rank 0 has a head
    with labels."""

    rank: int
    size: int
    heads: range
    kv_heads: range
    inner: range
    shared_inner: range
    tokens: range
    vocab_size: int
    config: ModelConfig


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Of a tensor's `total` rows (dim 0) or columns (dim 1) those from `first` on, as many as are wanted."""

    dim: int
    first: int
    total: int

    def whole(self, part: Shape) -> Shape:
        """The stored tensor's shape."""
        return (*part[: self.dim], self.total, *part[self.dim + 1 :])

    def index(self, part: Shape) -> tuple[slice, ...]:
        return (*(slice(None) for _ in range(self.dim)), slice(self.first, self.first + part[self.dim]))


Spans = Mapping[str, Span]
"""By the tensor's name; of those that are read in part alone."""


def share_of(config: ModelConfig, rank: int, size: int) -> Share:
    """size: at most as many as `check_ranks` allows. No rank has more of anything than rank 0."""
    assert 0 <= rank < size
    heads, kv_heads = _heads(config, rank, size)
    moe = config.moe
    inner, tokens = _part(config.intermediate_size, rank, size), _part(config.vocab_size, rank, size)
    shared_inner = range(0) if moe is None else _part(moe.shared_expert_intermediate_size, rank, size)
    head = config.head if rank == 0 or config.head.generates else Head(kind="none")
    part = replace(
        config,
        num_attention_heads=len(heads),
        num_key_value_heads=len(kv_heads),
        intermediate_size=max(1, len(inner)),
        vocab_size=len(tokens),
        moe=None if moe is None else replace(moe, shared_expert_intermediate_size=len(shared_inner)),
        head=head,
    )
    return Share(
        rank=rank, size=size, heads=heads, kv_heads=kv_heads, inner=inner, shared_inner=shared_inner, tokens=tokens,
        vocab_size=config.vocab_size, config=part,
    )  # fmt: skip


def shares_of(config: ModelConfig, size: int) -> list[Share]:
    """Of all ranks; empty for one, which has the whole model."""
    return [share_of(config, rank, size) for rank in range(size)] if size > 1 else []


def check_ranks(config: ModelConfig, engine: EngineConfig) -> None:
    """Raises SetupError where a model cannot be divided among so many ranks, or not with the engine's other options."""
    size = engine.tensor_parallel_size
    if size == 1:
        return
    least = min((len(range_), what) for range_, what in _divided(config))
    if size > least[0]:
        raise SetupError(f"{FIELD} is {size}, and the model has {least[0]} {least[1]}: {least[0]} ranks can share them")
    if config.stored is not None and config.stored.is_ordered:
        what, instead = "inputs in an order of each matrix's own (desc_act)", "use one rank, or a checkpoint without it"
        raise SetupError(f"{FIELD} is {size}: {what} cannot be divided among ranks: {instead}")


def _divided(config: ModelConfig) -> list[tuple[range, str]]:
    """All that is divided, and its name."""
    found = [(range(config.num_attention_heads), "query heads"), (range(config.vocab_size), "tokens")]
    if len(config.sparse_layers) < config.num_hidden_layers:
        found.append((range(config.intermediate_size), "inner features (intermediate_size)"))
    if config.moe is not None:
        size = config.moe.shared_expert_intermediate_size
        found.append((range(size), "inner features (shared_expert_intermediate_size)"))
    return found


def _heads(config: ModelConfig, rank: int, size: int) -> tuple[range, range]:
    """The query heads of one key/value head stay together as long as there are key/value heads for all ranks."""
    num_kv, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if size <= num_kv:
        kv_heads = _evenly(num_kv, rank, size)
        return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
    for kv_head in range(num_kv):
        from_end = _evenly(size, num_kv - 1 - kv_head, num_kv)
        ranks = range(size - from_end.stop, size - from_end.start)  # the fewest share the first: rank 0 has most heads
        if rank in ranks:
            part = _evenly(group, rank - ranks.start, len(ranks))
            first = kv_head * group
            return range(first + part.start, first + part.stop), range(kv_head, kv_head + 1)
    raise AssertionError("every rank has a key/value head")


def _part(total: int, rank: int, size: int) -> range:
    units = (unit for unit in _UNITS if total % unit == 0)
    unit = next((u for u in units if total % (u * size) == 0 or total // u >= _UNITS_EACH * size), 1)
    part = _evenly(total // unit, rank, size)
    return range(part.start * unit, part.stop * unit)


def _evenly(total: int, place: int, places: int) -> range:
    """The first places have one more where it does not divide."""
    each, more = divmod(total, places)
    first = place * each + min(place, more)
    return range(first, first + each + (place < more))
