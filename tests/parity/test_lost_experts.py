"""An expert without a living copy, on the whole model: who needs it waits, the others go on, and no answer changes."""

from dataclasses import replace

import pytest
import torch
from configs import NUM_TOKENS, PROMPTS
from drafters import Told, with_drafts
from rank_tools import ThreadRanks

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import EngineConfig
from cluster.engine.load import load_engine
from cluster.errors import ShardUnavailable
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import PlacementPlan
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import LocalTransport
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry
from cluster.types import SAMPLING_DEFAULTS, EngineRequest, SamplingParams

LAYER = 1
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True).with_defaults(SAMPLING_DEFAULTS)


class Mortal(LocalTransport):
    """Shard 1 may die. Keeps the experts that were asked for at LAYER."""

    dead = False

    def __init__(self, shards):
        super().__init__(shards)
        self.asked = set()

    def submit(self, shard_id, batch):
        if batch.layer_id == LAYER:
            self.asked |= set(batch.topk_ids.flatten().tolist())
        if self.dead and shard_id == 1:
            raise ShardUnavailable("shard 1 is dead", 1)
        return super().submit(shard_id, batch)


class Plans:
    def __init__(self, plan):
        self.plan = plan

    def current(self):
        return self.plan

    def wait_beyond(self, epoch, timeout_s):
        return self.plan.epoch > epoch


def engine_with(oracle, rare_expert, num_ranks=1):
    """Shard 0 holds all experts but one of LAYER, shard 1 that one."""
    reader = CheckpointReader(oracle.model_dir)
    config = reader.config
    every = tuple(range(config.num_experts))
    without = tuple(expert for expert in every if expert != rare_expert)
    slices = ({i: without if i == LAYER else every for i in config.sparse_layers}, {LAYER: (rare_expert,)})
    shards = {}
    for shard_id, experts in enumerate(slices):
        shards[shard_id] = ExpertShard(shard_id, config, dtype=torch.float32, device=torch.device("cpu"))
        shards[shard_id].load(reader, experts)
    plans = Plans(PlacementPlan(epoch=1, num_experts=config.num_experts, slices=slices))
    experts = ExpertDispatcher(Mortal(shards), plans, DispatchMetrics(new_registry(), "test"))
    limits = EngineConfig(
        dtype="float32", device="cpu", kv_cache_bytes=1 << 22, block_size=4, tensor_parallel_size=num_ranks
    )
    others = ThreadRanks(oracle.model_dir, limits) if num_ranks > 1 else None
    engine = load_engine(oracle.model_dir, limits, experts, EngineMetrics(new_registry(), "test"), others=others)
    return engine, others


def submit(engine, request_id, number):
    engine.submit(EngineRequest(request_id=request_id, prompt_token_ids=tuple(PROMPTS[number]), params=GREEDY))


def take(engine, answers):
    for update in engine.step():
        assert update.error is None
        answers.setdefault(update.request_id, []).extend(update.token_ids)


def rare_expert(oracle):
    """An expert of LAYER that prompt 1 needs, its continuation included, and no other does."""
    (engine, _), asked = engine_with(oracle, 0), []
    for number in range(len(PROMPTS)):
        engine.runner.experts.transport.asked = set()
        submit(engine, "alone", number)
        while engine.has_work:
            engine.step()
        asked.append(engine.runner.experts.transport.asked)
    return min(asked[1] - asked[0] - asked[2] - asked[3])


@pytest.mark.parametrize(("num_parts", "num_ranks"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("dies_after", [0, 1])
@pytest.mark.parametrize("drafted", [False, True])
def test_who_needs_a_lost_expert_waits_and_the_others_go_on(oracle_of, dies_after, num_parts, num_ranks, drafted):
    """With drafts too: some of their tokens are wrong, and may need the expert where their sequence does not.

    Other ranks of the model hear nothing of it, and finish the step.
    """
    oracle = oracle_of("released key style, 60 experts")
    engine, others = engine_with(oracle, rare_expert(oracle), num_ranks)
    experts = engine.runner.experts
    engine.runner.micro_batching.choose = lambda num_tokens, num_sequences: min(num_parts, num_sequences)
    if drafted:
        with_drafts(engine, Told(zip(PROMPTS, oracle.token_ids, strict=True), wrong=0.3, vocab_size=200))
    answers = {}
    for number in range(len(PROMPTS)):
        submit(engine, str(number), number)
    for _ in range(dies_after):
        take(engine, answers)
    experts.transport.dead = True
    while len(engine.sequences) > 1:
        take(engine, answers)
    assert [answers[number] for number in "023"] == [oracle.token_ids[int(number)] for number in "023"]
    assert len(answers.get("1", [])) < NUM_TOKENS
    submit(engine, "begins alike", 1)  # what the thrown away steps left must not be found
    for _ in range(3):
        take(engine, answers)
    experts.transport.dead = False
    experts.plans.plan = replace(experts.plans.plan, epoch=2)
    while engine.has_work:
        take(engine, answers)
    assert [answers[str(number)] for number in range(len(PROMPTS))] == oracle.token_ids
    assert answers["begins alike"] == oracle.token_ids[1]
    assert engine.blocks.num_used == 0
    if others is not None:
        others.close()
