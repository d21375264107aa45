"""Each cell of the table in docs/models.md: a family, a result, a dtype, a transport, against transformers.

In float32 tokens are equal, those of steps with drafts too, and numbers within 1e-4. In 16 bits both round: our numbers
may be off those of float32 by 3 times as much as those of transformers in that dtype are (those of all prompts together
with an adapter, whose part is rounded by itself); and where greedy tokens part, each must be among the other's five
likeliest.
"""

import re

import pytest
import torch
from actor_experts import ActorExperts
from configs import NUM_TOKENS, PROMPTS
from drafters import Told, with_drafts
from lora_tools import write_adapter_of, write_merged
from matrix import (
    ADAPTED,
    ADAPTER,
    CELLS,
    DIVIDED_ADAPTER,
    RANKS,
    RESULTS,
    TOKENS,
    Reference,
    cell_id,
    class_of,
    raw_config,
)
from rank_tools import ThreadRanks
from safetensors.torch import load_file, save_file

from cluster import LLM, SamplingParams, llm
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.runtime.start import offline
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir_of(tmp_path_factory):
    made = {}

    def get(family, head):
        if (family, head) not in made:
            made[family, head] = tmp_path_factory.mktemp("matrix") / "model"
            write_checkpoint(made[family, head], raw_config(family, head), seed=3)
            name_as_written_by(class_of(family, head), made[family, head] / "model.safetensors")
        return made[family, head]

    return get


def adapter_of(model_dir):
    """The directories of an adapter of attention, SwiGLUs and routed experts, and of the model that has it merged."""
    law, merged = model_dir.parent / "law", model_dir.parent / "merged"
    if not law.exists():
        write_adapter_of(law, model_dir, "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", scale=1 / 16)
        write_merged(merged, model_dir, law)
    return law, merged


def name_as_written_by(kind, file):
    """Some of transformers' classes call the decoder otherwise."""
    prefix = f"{kind.base_model_prefix}."
    save_file({re.sub(r"^model\.", prefix, name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def reference_of():
    made = {}

    def get(model_dir, head, dtype):
        if (model_dir, dtype) not in made:
            made[model_dir, dtype] = Reference(model_dir, head, dtype)
        return made[model_dir, dtype]

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


def marks_of(cell):
    """Both dtypes of 16 bits over Ray take as long as all else together."""
    _, result, dtype, transport = cell
    over_ray = transport in ("stream", "ray")
    is_slow = (transport != "local" and dtype != "float32") or (
        transport in (RANKS, DIVIDED_ADAPTER) and result != TOKENS
    )
    is_slow = is_slow or transport == ADAPTER
    return [mark for mark, wanted in ((pytest.mark.ray, over_ray), (pytest.mark.slow, is_slow)) if wanted]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell_id(cell), marks=marks_of(cell)) for cell in CELLS],
)
def test_a_cell(cell, model_dir_of, reference_of, actors, monkeypatch):
    family, result, dtype, transport = cell
    monkeypatch.setattr(llm, "ChildRanks", ThreadRanks)
    if transport in ("stream", "ray"):
        monkeypatch.setattr(offline, "RayExperts", lambda cluster, metrics: ActorExperts(actors(), cluster, metrics))
    head = "ForCausalLM" if result == TOKENS else RESULTS[result].head
    model_dir, adapter = model_dir_of(family, head), "law" if transport in ADAPTED else ""
    law, merged = adapter_of(model_dir) if adapter else (None, model_dir)
    exact, same_dtype = reference_of(merged, head, "float32"), reference_of(merged, head, dtype)
    with LLM(
        model_dir, dtype=dtype, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22, num_expert_shards=2,
        transport=transport if transport in ("stream", "ray") else "local", lora_adapters={"law": law} if law else None,
        tensor_parallel_size=2 if transport in (RANKS, DIVIDED_ADAPTER) else 1,
    ) as model:  # fmt: skip
        if result == TOKENS:
            outputs = check_tokens(model, same_dtype, adapter, exactly=dtype == "float32")
            if dtype == "float32":
                answers = [output.token_ids for output in outputs]
                payoff = with_drafts(model.engine, Told(zip(PROMPTS, answers, strict=True), wrong=0.3, vocab_size=200))
                again = model.generate(PROMPTS, GREEDY, adapter=adapter)
                assert [output.token_ids for output in again] == answers
                assert sum(payoff.tried)
            return
        every = [
            (ours, *(RESULTS[result].theirs(reference, prompt) for reference in (exact, same_dtype)))
            for prompt, ours in zip(PROMPTS, RESULTS[result].ours(model, adapter), strict=True)
        ]
    if adapter and dtype != "float32":
        every = [[torch.cat([one.flatten() for one in of_all]) for of_all in zip(*every, strict=True)]]
    for ours, expected, theirs in every:
        if dtype == "float32":
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        else:
            assert (ours - expected).norm() <= 3 * (theirs - expected).norm() + 1e-3 * expected.norm()


def check_tokens(model, reference, adapter, *, exactly):
    outputs = model.generate(PROMPTS, GREEDY, adapter=adapter)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = list(prompt)
        for token_id in output.token_ids:
            logits = reference.logits(ids)[-1]
            if token_id != int(logits.argmax()):
                assert not exactly
                assert token_id in logits.topk(5).indices
                assert logits.argmax() in model.logits(ids, adapter=adapter)[-1].topk(5).indices
                break
            ids.append(token_id)
    return outputs
