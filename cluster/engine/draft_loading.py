"""Puts the drafter of an engine together, from a checkpoint of its own where a model drafts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cluster.checkpoint.opening import open_checkpoint
from cluster.config import EngineConfig, ModelConfig
from cluster.engine.block_manager import make_block_manager
from cluster.engine.draft_model import DraftModel
from cluster.engine.graphs import decode_graphs
from cluster.engine.payoff import Payoff
from cluster.engine.prompt_lookup import PromptLookup
from cluster.engine.runner import ModelRunner
from cluster.engine.speculation import Drafter, SpeculatingRunner
from cluster.engine.step import Runner
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.experts.transport import LocalTransport
from cluster.kernels.stored import quantization_on
from cluster.metrics import DispatchMetrics, new_registry
from cluster.model.cache_size import num_kv_blocks
from cluster.model.decoder import CausalLM
from cluster.model.kv_cache import cache_for
from cluster.model.registry import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWeights:
    """A draft model that is loaded, and its part of each token's bytes in both KV caches."""

    model: CausalLM
    dtype: str
    share: float

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def load_draft(
    config: EngineConfig, model: CausalLM, dtype: str, progress: Callable[[int], None] | None = None
) -> DraftWeights | None:
    """The draft model that the configuration asks for, if it does. Blocks. Raises CheckpointError, SetupError.

    model: the one that it drafts for, in `dtype`.
    """
    asked = config.speculation
    if asked is None or asked.model is None:
        return None
    reader, weight = open_checkpoint(asked.model), model.model.norm.weight
    device = weight.device
    loaded = load_model(
        reader, dtype=weight.dtype, device=device, progress=progress,
        quantization=quantization_on(config.quantization, device, reader.config.stored),
    )  # fmt: skip
    part, rest = (one.kv_bytes_per_token(config.cache_dtype(dtype)) for one in (reader.config, model.config))
    return DraftWeights(model=loaded, dtype=dtype, share=part / (part + rest))


def models_part(config: EngineConfig, share: float, draft: DraftWeights | None) -> tuple[EngineConfig, float]:
    """The configuration and the share of the free memory for the cache of the model that is drafted for."""
    return _part(config, share, 1.0 if draft is None else 1.0 - draft.share)


def _part(config: EngineConfig, share: float, part: float) -> tuple[EngineConfig, float]:
    if config.kv_cache_bytes is not None:
        config = replace(config, kv_cache_bytes=max(1, int(config.kv_cache_bytes * part)))
    return config, share * part


def with_drafts(
    runner: ModelRunner,
    config: EngineConfig,
    draft: DraftWeights | None,
    *,
    room_bytes: int | None,
    share: float,
) -> Runner:
    """The runner, or one around it that takes drafts if the configuration asks for them.

    room_bytes, share: as of `num_kv_blocks`, of both caches together.
    """
    asked = config.speculation
    if asked is None:
        return runner
    drafter: Drafter = PromptLookup(shortest=asked.prompt_lookup_min, longest=asked.prompt_lookup_max)
    if draft is not None:
        drafter = _draft_model(draft, config, runner.device, room_bytes=room_bytes, share=share)
    return SpeculatingRunner(
        runner,
        drafter,
        Payoff(),
        num_ahead=asked.num_speculative_tokens,
        max_rows=config.max_num_batched_tokens,
    )


def _draft_model(
    draft: DraftWeights, config: EngineConfig, device: torch.device, *, room_bytes: int | None, share: float
) -> DraftModel:
    limits, share = _part(config, share, draft.share)
    longest = min(draft.config.context_length, config.max_model_len or draft.config.context_length)
    num_blocks = num_kv_blocks(
        draft.config, limits, draft.dtype, max_model_len=longest, room_bytes=room_bytes, share=share
    )
    cache = cache_for(draft.config, config, num_blocks, draft.dtype, device)
    plan = plan_evenly((), 0, 0)
    none = ExpertDispatcher(LocalTransport({}), FixedPlan(plan), DispatchMetrics(new_registry(), "draft"))
    runner = ModelRunner(draft.model, cache, none, config.block_size)
    if config.cuda_graphs:
        runner.graphs = decode_graphs(draft.model, cache, runner.attention, none, max_sequences=config.max_num_seqs)
    return DraftModel(
        runner,
        make_block_manager(draft.config, config, num_blocks),
        max_rows=config.max_num_batched_tokens,
        max_model_len=longest,
        max_mirrors=config.max_num_seqs,
    )
