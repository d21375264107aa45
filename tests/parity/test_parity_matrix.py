"""Each cell of the table in docs/models.md: a family, a result, a dtype, a transport, against transformers.

In float32 tokens are equal and numbers within 1e-4. In 16 bits both round: our numbers may be off those of float32 by
3 times as much as those of transformers in that dtype are; and where greedy tokens part, each must be among the
other's five likeliest.
"""

import pytest
import torch
from actor_experts import ActorExperts
from configs import NUM_TOKENS, PROMPTS
from matrix import CELLS, FAMILIES, RESULTS, TOKENS, Reference, cell_id

from cluster import LLM, SamplingParams, llm
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp("matrix") / family for family in FAMILIES}
    for family, model_dir in made.items():
        write_checkpoint(model_dir, FAMILIES[family], seed=3)
    return made


@pytest.fixture(scope="module")
def references(model_dirs):
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            made[family, dtype] = Reference(model_dirs[family], dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="module")
def actors(request):
    """Two shards' processes, made when a cell wants some; each cell loads them anew."""
    made = []

    def get():
        if not made:
            ray = request.getfixturevalue("ray_cluster")
            shard_class = ray.remote(concurrency_groups=SHARD_GROUPS)(ExpertShardActor)
            made.extend(shard_class.options(num_cpus=1).remote(shard_id, 1) for shard_id in range(2))
            request.addfinalizer(lambda: [ray.kill(actor) for actor in made])
        return made

    return get


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell_id(cell), marks=[] if cell[3] == "local" else pytest.mark.ray) for cell in CELLS],
)
def test_a_cell(cell, model_dirs, references, actors, monkeypatch):
    family, head, dtype, transport = cell
    if transport != "local":
        monkeypatch.setattr(llm, "RayExperts", lambda cluster, metrics: ActorExperts(actors(), cluster, metrics))
    exact, same_dtype = references(family, "float32"), references(family, dtype)
    with LLM(
        model_dirs[family], dtype=dtype, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22, num_expert_shards=2,
        transport=transport,
    ) as model:  # fmt: skip
        if head == TOKENS:
            check_tokens(model, same_dtype, exactly=dtype == "float32")
            return
        for prompt, ours in zip(PROMPTS, RESULTS[head].ours(model), strict=True):
            expected, theirs = (RESULTS[head].theirs(reference, prompt) for reference in (exact, same_dtype))
            if dtype == "float32":
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
            else:
                assert (ours - expected).norm() <= 3 * (theirs - expected).norm() + 1e-3 * expected.norm()


def check_tokens(model, reference, *, exactly):
    for prompt, output in zip(PROMPTS, model.generate(PROMPTS, GREEDY), strict=True):
        ids = list(prompt)
        for token_id in output.token_ids:
            logits = reference.logits(ids)[-1]
            if token_id != int(logits.argmax()):
                assert not exactly
                assert token_id in logits.topk(5).indices
                assert logits.argmax() in model.logits(ids)[-1].topk(5).indices
                break
            ids.append(token_id)
