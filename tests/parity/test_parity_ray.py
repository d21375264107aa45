"""The same over Ray calls and over streams, with 1, 3 and 7 shards: seven actors, loaded anew for each case."""

import pytest
import torch
from configs import NUM_TOKENS, PROMPTS
from parity_tools import logprobs_of

from cluster import LLM, SamplingParams
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import EngineConfig
from cluster.engine.load import load_engine
from cluster.errors import ShardUnavailable
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry
from cluster.runtime.process import process_info
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor
from cluster.runtime.workers.transports import RayOffers, RayTransport
from cluster.stream.client import StreamTransport
from cluster.types import SAMPLING_DEFAULTS, EngineRequest

pytestmark = pytest.mark.ray

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True).with_defaults(SAMPLING_DEFAULTS)


class Handles:
    def __init__(self, actors):
        self.actors = actors

    def handle(self, shard_id):
        return self.actors[shard_id]


@pytest.fixture(scope="module")
def actors(ray_cluster):
    shard_class = ray_cluster.remote(concurrency_groups=SHARD_GROUPS)(ExpertShardActor)
    made = [shard_class.options(num_cpus=1).remote(shard_id, 1) for shard_id in range(7)]
    ray_cluster.get([actor.process.remote() for actor in made])
    yield made
    for actor in made:
        ray_cluster.kill(actor)


def carry(carrier, actors):
    by_ray = RayTransport(Handles(actors))
    if carrier == "ray":
        return by_ray
    return StreamTransport(RayOffers(Handles(actors)), node=process_info().node_id, fallback=None, timeout_s=30.0)


@pytest.mark.parametrize("carrier", ["ray", "stream"])
@pytest.mark.parametrize("num_shards", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 7])
def test_greedy_tokens_through_ray_are_those_of_transformers(moe_oracle, actors, ray_cluster, num_shards, carrier):
    """Mixed lengths, a token budget of 16 (so chunked prompts beside decodes) and room for 12 blocks (preemption)."""
    config = CheckpointReader(moe_oracle.model_dir).config
    plan = plan_evenly(config.sparse_layers, config.num_experts, num_shards)
    loads = [
        actor.load.remote(str(moe_oracle.model_dir), dict(experts), "float32", "cpu")
        for actor, experts in zip(actors, plan.slices, strict=False)
    ]
    assert sum(ray_cluster.get(loads)) == len(config.sparse_layers) * config.num_experts * config.expert_bytes(
        "float32"
    )
    registry = new_registry()
    dispatcher = ExpertDispatcher(carry(carrier, actors), FixedPlan(plan), DispatchMetrics(registry, "test"))
    limits = EngineConfig(
        dtype="float32", device="cpu", block_size=4, kv_cache_bytes=12 * 4 * config.kv_bytes_per_token("float32"),
        max_num_batched_tokens=16,
    )  # fmt: skip
    engine = load_engine(moe_oracle.model_dir, limits, dispatcher, EngineMetrics(registry, "test"))
    for num_parts in (1, 2):
        engine.runner.micro_batching.choose = lambda tokens, sequences, parts=num_parts: min(parts, sequences)
        for index, prompt in enumerate(PROMPTS):
            engine.submit(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=GREEDY))
        answers = {str(index): [] for index in range(len(PROMPTS))}
        while engine.has_work:
            for update in engine.step():
                assert update.error is None
                answers[update.request_id] += update.token_ids
        assert list(answers.values()) == moe_oracle.token_ids
    dispatcher.transport.close()


@pytest.mark.parametrize("carrier", ["ray", *(pytest.param(c, marks=pytest.mark.slow) for c in ("stream", "auto"))])
def test_logits_through_the_controllers_shards_are_those_of_transformers(ray_cluster, oracle_of, carrier):
    oracle = oracle_of("released key style, 60 experts")
    with LLM(
        oracle.model_dir, dtype="float32", device="cpu", num_expert_shards=3, transport=carrier, skip_tokenizer=True,
        kv_cache_bytes=1 << 22,
    ) as llm:  # fmt: skip
        found = llm.prompt_logprobs(PROMPTS)
        for prompt, expected, scored in zip(PROMPTS, oracle.logits, found, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(scored.logprobs, logprobs_of(prompt, expected), atol=1e-4, rtol=0)


def test_a_shard_refuses_an_expert_that_it_does_not_hold(oracle_of, actors, ray_cluster):
    oracle = oracle_of("released key style, 60 experts")
    config = CheckpointReader(oracle.model_dir).config
    ray_cluster.get(actors[0].load.remote(str(oracle.model_dir), {0: (3, 4)}, "float32", "cpu"))
    dispatcher = ExpertDispatcher(
        RayTransport(Handles(actors)),
        FixedPlan(plan_evenly(config.sparse_layers, config.num_experts, 1)),
        DispatchMetrics(new_registry(), "test"),
        recovery_timeout_s=0.1,
    )
    flight = dispatcher.dispatch(
        0, torch.zeros(2, config.hidden_size), torch.tensor([[3, 4], [4, 5]]), torch.ones(2, 2)
    )
    with pytest.raises(ShardUnavailable, match="layer 0"):
        dispatcher.combine(flight)
