"""Expert shards on Ray without an application: their resources, their end, and checkpoints that cannot load."""

import itertools
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from gptq_tools import write_pair
from served_tools import plasma_objects, wait_until
from stored_tools import MOE, write_awq, write_packed

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import ClusterConfig
from cluster.errors import CheckpointError, SetupError
from cluster.metrics import DispatchMetrics, new_registry
from cluster.runtime.start.local_ray import start_ray
from cluster.runtime.start.offline import RayExperts

pytestmark = pytest.mark.ray


@pytest.fixture
def config(demo_checkpoint):
    return ClusterConfig(
        model=str(demo_checkpoint), dtype="float32", device="cpu", expert_shards=2, gpus_per_expert_shard=0.5
    )


def start(config):
    return RayExperts(config, DispatchMetrics(new_registry(), "test"))


def test_shards_take_the_fractions_of_gpus_that_they_are_configured_for(ray_cluster, config):
    """Two shards of half a GPU take one from the cluster, and give it back."""
    before = ray_cluster.available_resources()["GPU"]
    experts = start(config)
    try:
        assert before - ray_cluster.available_resources()["GPU"] == pytest.approx(1.0)
        assert len(experts.dispatcher.plans.current().slices) == 2
    finally:
        experts.close()
    experts.close()  # again: nothing left to do


def test_more_gpus_than_the_cluster_has_are_refused(ray_cluster, config):
    with pytest.raises(SetupError, match=r"34 GPUs are asked for .* the Ray cluster has 16"):
        start(replace(config, gpus_per_expert_shard=17.0))


def test_a_damaged_slice_is_named_when_its_shard_loads(ray_cluster, config, tmp_path):
    """All names exist, so only the shard that reads the file can find the damage."""
    for file in Path(config.model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=last.name):
        start(replace(config, model=str(tmp_path)))


def test_a_connected_ray_is_left_as_it_is(ray_cluster):
    start_ray(num_cpus=1).stop()
    assert ray_cluster.is_initialized()


def test_the_object_store_does_not_grow_where_rows_go_through_it(ray_cluster, demo_checkpoint):
    """1,000 requests over Ray calls, without prefix caching: every eighth prompt is 500 tokens long, and its batches,
    some 430 rows of 256 bytes for each shard, are over the 100 KB from which Ray uses its store."""
    with LLM(
        demo_checkpoint, num_expert_shards=2, transport="ray", kv_cache_bytes=1 << 22, enable_prefix_caching=False
    ) as llm:
        prompts = [list(range(500)) if index % 8 == 0 else [index] for index in range(1000)]
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate(prompts[:16], params)
        before = plasma_objects(ray_cluster)
        assert sum(len(output.token_ids) for output in llm.generate(prompts, params)) == 1000
        wait_until(lambda: plasma_objects(ray_cluster) <= before, f"the store has no more than {before} objects")


NF4 = {"quantization": "nf4", "expert_quantization": "nf4"}


def write_plain(folder, raw):
    """Not rounded yet; inputs in blocks of 64, as nf4 has them."""
    sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64)
    write_checkpoint(folder / "model", {**raw, **sizes}, seed=1)
    return folder / "model", folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "write", "options"),
    [
        ("ray", partial(write_pair, sym=False), {}),
        ("stream", write_awq, {}),
        ("ray", partial(write_packed, num_bits=4, group_size=32), {}),
        ("ray", write_plain, {**NF4, "kv_cache_dtype": "fp8", "device": "cpu"}),
        ("stream", write_plain, {"kv_cache_dtype": "int8", "device": "cpu"}),
    ],
    ids=["gptq", "awq", "w4a16", "nf4, fp8 cache", "int8 cache"],
)
def test_shards_of_a_rounded_model_answer_as_one_process_does(ray_cluster, tmp_path, transport, write, options):
    """Also when one of them is killed meanwhile: its successor has its experts in the same form. Weights, or keys and
    values, are rounded."""
    stored, plain = write(tmp_path, MOE)
    options = {"dtype": "float32", "kv_cache_bytes": 1 << 22, "skip_tokenizer": True, **options}

    def answers(llm):
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)
        return [output.token_ids for output in llm.generate([[5, 9, 17], [1, 2]], params)]

    with LLM(plain, **options) as llm:
        expected = answers(llm)
    with LLM(stored, num_expert_shards=3, transport=transport, **options) as llm:
        assert answers(llm) == expected
        kill_in_the_third_step(llm, shards_of(ray_cluster, llm)[1].process.pid)
        assert answers(llm) == expected
        assert shards_of(ray_cluster, llm)[1].respawns == 1


def shards_of(ray_cluster, llm):
    experts = llm._close_experts.__self__
    return ray_cluster.get(experts._controller.status.remote()).shards


def kill_in_the_third_step(llm, pid):
    run, steps = llm.engine.runner.run, itertools.count(1)

    def killing(batch):
        if next(steps) == 3:
            os.kill(pid, signal.SIGKILL)
        return run(batch)

    llm.engine.runner.run = killing


def test_rounded_shards_answer_as_one_process_does(ray_cluster, demo_checkpoint):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    found = []
    for way in ("stream", "local"):
        with LLM(
            demo_checkpoint,
            dtype="float32",
            num_expert_shards=2,
            transport=way,
            kv_cache_bytes=1 << 22,
            quantization="int8",
            expert_quantization="int4-32",
        ) as llm:
            found.append(llm.generate(["Which experts answered?", "hello"], params))
    for split, whole in zip(*found, strict=True):
        assert split.token_ids == whole.token_ids
        assert [entry.logprob for entry in split.logprobs] == pytest.approx(
            [e.logprob for e in whole.logprobs], abs=1e-4
        )
