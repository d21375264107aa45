"""The cost of a step on a GPU, worked out: the slower of its reads and its products, and a time for each layer beside.

Source: Williams, Waterman and Patterson, Roofline (2009).
"""

from cluster.checkpoint.sizes import ModelSizes
from cluster.config import DTYPE_BYTES, ModelConfig
from cluster.planning.calibration import touched_experts
from cluster.planning.costs import StepWork
from cluster.planning.hardware import MEASURED, Gpu, Reach


class Roofline:
    """`StepCosts` of a model whose processes have a GPU each."""

    def __init__(self, config: ModelConfig, sizes: ModelSizes, gpu: Gpu, reach: Reach = MEASURED) -> None:
        self._config, self._sizes, self._reach = config, sizes, reach
        self._bytes_s, self._flops = gpu.bytes_s * reach.memory, gpu.flops * reach.compute
        item_bytes = DTYPE_BYTES[sizes.dtype]
        table = config.vocab_size * config.hidden_size
        tables = 1 if config.tie_word_embeddings else 2
        self._head = table
        self._dense = sizes.dense_bytes // item_bytes - tables * table  # parameters that each row is multiplied with
        self._read_bytes = (self._dense + table) * item_bytes  # an embedding is looked up, not read as a whole
        shared = 0 if config.moe is None else config.moe.shared_expert_intermediate_size
        self._shared = 3 * config.hidden_size * shared * len(config.sparse_layers)
        self._shared_bytes = self._shared * item_bytes
        self._expert = 0 if config.moe is None else 3 * config.hidden_size * config.moe.moe_intermediate_size
        self._num_layers = len(config.sparse_layers)

    def attention_s(self, work: StepWork) -> float:
        read = self._read_bytes + work.context * self._sizes.kv_bytes_per_token
        products = 2 * (self._dense * work.rows + self._head * work.samples)
        beside = self._config.num_hidden_layers * self._reach.layer_s + work.rows * self._reach.row_s
        return max(read / self._bytes_s, products / self._flops) + beside

    def shared_s(self, rows: int) -> float:
        return max(self._shared_bytes / self._bytes_s, 2 * self._shared * rows / self._flops)

    def shard_s(self, rows: int, num_shards: int, imbalance: float = 1.0) -> float:
        num_experts, top_k = self._config.num_experts, self._config.num_experts_per_tok
        read = touched_experts(rows, num_experts, top_k) * self._sizes.expert_bytes / self._bytes_s
        products = 2 * self._expert * rows * top_k / self._flops
        return self._num_layers * imbalance * max(read, products) / num_shards

    def crossing_s(self, rows: int, num_shards: int) -> float:
        """Rows are small beside what a call takes: 4 KB of a row at 25 GB/s are 0.2 us."""
        return self._num_layers * self._reach.crossing_s
