"""The ranks from 1 on of a model that is divided: each computes its part of every step that rank 0 tells.

A follower has weights and a KV cache, and no scheduler, no experts and no sequences.
T: rows, H: hidden size, v: this rank's part of the vocabulary.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint.info import max_model_len, resolve_dtype
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import EngineConfig
from cluster.config.tensor_parallel import Share, share_of
from cluster.engine.adapter_loading import adapter_loader
from cluster.engine.divided_adapters import HeardAdapters
from cluster.engine.group import Group
from cluster.engine.leader import FORGET, LOGITS, STEP, unpacked
from cluster.engine.load import device_of, free_memory, load_part, memory_share
from cluster.engine.step_inputs import StepArrays, micro_batch
from cluster.kernels.attention import make_attention
from cluster.model.cache_size import num_kv_blocks
from cluster.model.decoder import CausalLM
from cluster.model.kv_cache import KVCache, cache_for
from cluster.model.ranks import HeadAdapters, PartLogits

log = logging.getLogger(__name__)


class Follower:
    """The `Ranks` of its model. Used by one thread."""

    def __init__(self, group: Group, share: Share, model: CausalLM, cache: KVCache, adapters: HeardAdapters) -> None:
        self.share = share
        self._group, self._model, self._cache, self._adapters = group, model, cache, adapters
        self._attention = make_attention(cache.layer(0)[0], model.config.num_attention_heads)
        model.ranks = self

    def sum(self, x: Tensor) -> Tensor:
        """As `Ranks.sum`."""
        return self._group.sum(x)

    def logits(self, hidden_states: Tensor, adapters: HeadAdapters | None, part: PartLogits) -> Tensor:
        """Sends this rank's part to rank 0, and returns that."""
        logits = part(hidden_states, adapters)  # [T, v]
        self._group.send(logits)
        return logits

    def run(self) -> None:
        """Computes until rank 0 closes. Raises Unavailable when it is gone."""
        while True:
            heard = self._group.hear()
            if heard[0] == STEP:
                self._step(int(heard[1]), unpacked(heard[2:]))
            elif heard[0] == LOGITS:
                norm = self._model.model.norm.weight
                adapters = self._adapters.of(heard[2:].reshape(2, -1), self._cache.device)
                self._model.logits(self._group.share(norm.new_empty(int(heard[1]), len(norm))), adapters)
            elif heard[0] == FORGET:
                self._adapters.forget(heard[1:].tolist())
            else:
                return

    def _step(self, num_parts: int, arrays: list[np.ndarray]) -> None:
        parts = []
        for of_part in np.array_split(np.arange(len(arrays)), num_parts):
            mine = [arrays[i] for i in of_part]
            num_groups = len(self._cache.groups)
            for group, slots in zip(self._cache.groups, mine[-num_groups:], strict=True):
                group.clear(slots)
            step = StepArrays.of_arrays(mine[1:-num_groups], [group.padding_block for group in self._cache.groups])
            adapters = self._adapters.of(mine[0], self._cache.device)
            parts.append(micro_batch(step, self._attention, self._cache.device, None, adapters))
        self._model(parts, self._cache)


class LoadedRank:
    """A rank's weights, before it has joined the others."""

    def __init__(self, model: str, config: EngineConfig, rank: int) -> None:
        """Blocks. Raises CheckpointError, SetupError."""
        reader = open_checkpoint(model, config.rope_scaling)
        self._config, self._whole = config, reader.config
        self._share = share_of(reader.config, rank, config.tensor_parallel_size)
        self._model = load_part(reader, config, rank)

    def follow(self, join: Callable[[torch.device], Group], num_sharers: int) -> None:
        """Joins the others, and computes until rank 0 closes. num_sharers: as of `load_engine`.

        Raises Unavailable.
        """
        config, share, device = self._config, self._share, device_of(self._config)
        dtype = resolve_dtype(config.dtype, self._whole)
        group = join(device)
        adapters = HeardAdapters(group.changes, adapter_loader(self._model, self._whole, config, share.rank))
        group.least([0])  # rank 0 has its first adapters, so that the memory for them is not free any more
        num_blocks = num_kv_blocks(
            share.config, config, dtype, max_model_len=max_model_len(self._whole, config),
            room_bytes=free_memory(device), share=memory_share(config, device, num_sharers),
        )  # fmt: skip
        cache = cache_for(share.config, config, group.least(num_blocks), dtype, device)
        log.info("rank %d of %d has its weights, and %d bytes of the KV cache", share.rank, share.size, cache.num_bytes)
        Follower(group, share, self._model, cache, adapters).run()
        adapters.close()
