"""Facts of a model's experts that placement needs."""

from dataclasses import dataclass

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """num_experts: of each sparse layer.  expert_bytes: of one expert's weights."""

    sparse_layers: tuple[int, ...]
    num_experts: int
    expert_bytes: int


def read_expert_facts(config: ClusterConfig) -> ExpertFacts:
    """From the checkpoint's configuration and the names of its tensors. Raises SetupError."""
    reader = open_checkpoint(config.model)
    reader.check_names()
    return ExpertFacts(
        sparse_layers=tuple(reader.config.sparse_layers),
        num_experts=reader.config.num_experts,
        expert_bytes=reader.config.expert_bytes(resolve_dtype(config.dtype, reader.config), config.of_experts),
    )
