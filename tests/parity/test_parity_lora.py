"""LoRA adapters against the models that PEFT merges them into, in float32: near logits, the same greedy tokens."""

import json
from functools import cache
from itertools import count, product

import pytest
import torch
from configs import NUM_TOKENS, PROMPTS
from drafters import Told, with_drafts
from lora_tools import write_adapter
from parity_tools import ask, ask_peft, logprobs_of
from rank_tools import ThreadRanks
from transformers import AutoModelForCausalLM

from cluster import LLM, SamplingParams
from cluster import llm as llm_module
from cluster.checkpoint.opening import open_checkpoint
from cluster.engine import follower
from cluster.errors import CheckpointError, NotFound
from cluster.kernels.native.library import native

needs_native = pytest.mark.skipif(native() is None, reason="torch rounds a row in bfloat16 by the number of all")
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
ADAPTERS = {
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "wide": {
        "r": 6,
        "lora_alpha": 9,
        "use_rslora": True,
        "target_modules": r".*\.(k_proj|o_proj|(gate|up|down)_proj|shared_expert_gate)",
        "rank_pattern": {"o_proj": 3, r"layers\.1\..*down_proj": 5},
        "alpha_pattern": {"self_attn.k_proj": 20},
    },
    "words": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]},
}
BASES = ["every second layer sparse, a dense one named", "qwen2, released key style"]


@pytest.fixture(scope="module")
def adapted_of(oracle_of, tmp_path_factory):
    """From a base's name: its oracle, the directories of its adapters, and the oracle of each name, "" for the base."""

    @cache
    def get(name):
        base, directory = oracle_of(name), tmp_path_factory.mktemp("adapters")
        oracles = {name: ask_peft(base.model_dir, directory / name, **config) for name, config in ADAPTERS.items()}
        return base, {name: directory / name for name in ADAPTERS}, {"": base, **oracles}

    return get


@pytest.fixture(params=BASES)
def adapted(request, adapted_of):
    return adapted_of(request.param)


def llm_for(adapted, **options):
    base, adapters, _ = adapted
    options = {"kv_cache_bytes": 1 << 22, "num_expert_shards": 2, "dtype": "float32", **options}
    return LLM(base.model_dir, device="cpu", skip_tokenizer=True, **{"lora_adapters": adapters, **options})


def answers(llm, *names):
    """The tokens of all prompts with each adapter, in one batch, by name."""
    outputs = llm.generate(PROMPTS * len(names), GREEDY, adapter=[name for name in names for _ in PROMPTS])
    tokens = [list(output.token_ids) for output in outputs]
    return {name: tokens[i * len(PROMPTS) : (i + 1) * len(PROMPTS)] for i, name in enumerate(names)}


def expected(adapted, *names):
    return {name: adapted[2][name].token_ids for name in names}


def test_several_adapters_in_a_batch_give_the_tokens_of_their_merged_models(adapted):
    every = ("", *ADAPTERS)
    assert len({str(tokens) for tokens in expected(adapted, *every).values()}) == 4, "the adapters change nothing"
    with llm_for(adapted) as llm:
        for name in every:
            for prompt, logits in zip(PROMPTS, adapted[2][name].logits, strict=True):
                torch.testing.assert_close(llm.logits(prompt, adapter=name), logits, atol=1e-4, rtol=0)
        assert answers(llm, *every) == expected(adapted, *every)
        llm.engine.runner.micro_batching.choose = lambda num_tokens, num_sequences: min(2, num_sequences)
        assert answers(llm, "wide", "", "words", "narrow") == expected(adapted, *every)


def test_probabilities_of_a_prompt_are_those_of_each_adapters_head(adapted_of, monkeypatch):
    """Of all prompts in one batch, five rows of logits at a time."""
    monkeypatch.setattr("cluster.engine.outcomes.LOGIT_ROWS", 5)
    adapted = adapted_of(BASES[1])
    asked = [(name, number) for number in range(len(PROMPTS)) for name in ("words", "", "narrow")]
    with llm_for(adapted) as llm:
        found = llm.prompt_logprobs([PROMPTS[i] for _, i in asked], adapter=[name for name, _ in asked])
    for (name, i), one in zip(asked, found, strict=True):
        expected = logprobs_of(PROMPTS[i], adapted[2][name].logits[i])
        torch.testing.assert_close(one.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_with_drafts_checks_each_row_with_its_own_head(adapted_of, monkeypatch, num_ranks):
    """Every second prompt has an adapter of embeddings and head, the others none; some drafts are wrong."""
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)
    adapted, names = adapted_of(BASES[1]), [("words", "")[i % 2] for i in range(len(PROMPTS))]
    wanted = [adapted[2][name].token_ids[i] for i, name in enumerate(names)]
    with llm_for(adapted, tensor_parallel_size=num_ranks, block_size=4) as llm:
        payoff = with_drafts(llm.engine, Told(zip(PROMPTS, wanted, strict=True), wrong=0.3, vocab_size=200))
        outputs = llm.generate(PROMPTS, GREEDY, adapter=names)
        assert [list(output.token_ids) for output in outputs] == wanted
        assert 10 < llm.engine.num_accepted_tokens < sum(payoff.tried)


def test_chunks_of_7_and_cached_beginnings_keep_adapters_apart(adapted):
    with llm_for(adapted, max_num_batched_tokens=7, block_size=4) as llm:
        for name in ("narrow", "wide", "words", "narrow"):  # the second time from the cache
            assert answers(llm, name) == expected(adapted, name)
        assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize(
    ("base", "dtype"), [pytest.param(BASES[0], "bfloat16", marks=needs_native), (BASES[1], "float32")]
)
def test_rows_of_the_base_do_not_change_by_a_bit(adapted_of, base, dtype):
    """Routed experts in float32 apart, which torch rounds by their number, as it does without adapters."""
    adapted = adapted_of(base)
    names = ["", "wide", "", "words"]
    with llm_for(adapted, dtype=dtype) as llm, llm_for(adapted, dtype=dtype, lora_adapters=None) as plain:
        mixed = llm.embed(PROMPTS, adapter=names, normalize=False)
        alone = plain.embed(PROMPTS, normalize=False)
    same = [torch.equal(a.embedding, b.embedding) for a, b in zip(mixed, alone, strict=True)]
    assert same == [True, False, True, False]


def test_adapters_come_and_go_while_the_model_runs(adapted_of):
    adapted = adapted_of(BASES[1])
    with llm_for(adapted, lora_adapters=None, block_size=4) as llm:
        with pytest.raises(NotFound, match=r"the adapter 'mine' is not loaded; loaded: none"):
            llm.generate(PROMPTS, GREEDY, adapter="mine")
        llm.load_adapter("mine", adapted[1]["narrow"])
        assert answers(llm, "mine")["mine"] == expected(adapted, "narrow")["narrow"]
        llm.load_adapter("mine", adapted[1]["wide"])  # another one of that name reads no block of the first
        assert answers(llm, "mine")["mine"] == expected(adapted, "wide")["wide"]
        llm.unload_adapter("mine")
        with pytest.raises(NotFound, match="is not loaded"):
            llm.generate(PROMPTS, GREEDY, adapter="mine")
        assert answers(llm, "") == expected(adapted, "")


@pytest.mark.parametrize(
    ("base", "num_ranks"),
    [(BASES[0], 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [*product(BASES, (2, 3, 4))][1:])],
)
def test_ranks_have_a_part_of_each_adapter(adapted_of, monkeypatch, base, num_ranks):
    """Of 3 or 4 ranks two have a copy of the same key/value head."""
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)
    adapted, every = adapted_of(base), ("", *ADAPTERS)
    with llm_for(adapted, tensor_parallel_size=num_ranks, max_num_batched_tokens=24, block_size=4) as llm:
        for name in every:
            for prompt, logits in zip(PROMPTS, adapted[2][name].logits, strict=True):
                torch.testing.assert_close(llm.logits(prompt, adapter=name), logits, atol=1e-4, rtol=0)
        llm.engine.runner.micro_batching.choose = lambda num_tokens, num_sequences: min(2, num_sequences)
        assert answers(llm, *every) == expected(adapted, *every)
        assert answers(llm, "wide", "", "words", "narrow") == expected(adapted, *every)


@pytest.fixture
def heard(monkeypatch):
    """The adapters that the ranks from 1 on have; rank 1 cannot read one with `unreadable` in its name."""
    made, loader = [], follower.adapter_loader

    class Heard(follower.HeardAdapters):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self._loaded)

    def failing(model, whole, config, rank):
        load = loader(model, whole, config, rank)

        def load_or_fail(source):
            if rank == 1 and "unreadable" in source.name:
                raise CheckpointError("/the/file is not complete")
            return load(source)

        return load_or_fail

    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)
    monkeypatch.setattr(follower, "HeardAdapters", Heard)
    monkeypatch.setattr(follower, "adapter_loader", failing)
    return made


def test_ranks_change_adapters_while_requests_run(adapted_of, heard):
    """A running sequence keeps the adapter that is replaced; its parts go with it."""
    adapted, found = adapted_of(BASES[1]), {}
    with llm_for(adapted, lora_adapters={"mine": adapted[1]["narrow"]}, tensor_parallel_size=3) as llm:
        run, steps = llm.engine.runner.run, count(1)

        def run_and_change(batch):
            if next(steps) == 3:
                llm.load_adapter("mine", adapted[1]["wide"])
                found["both"] = [len(one) for one in heard]
            return run(batch)

        llm.engine.runner.run = run_and_change
        assert answers(llm, "mine")["mine"] == expected(adapted, "narrow")["narrow"]
        assert answers(llm, "mine")["mine"] == expected(adapted, "wide")["wide"]
        assert (found["both"], [len(one) for one in heard]) == ([2, 2], [1, 1])
        llm.unload_adapter("mine")
        assert answers(llm, "") == expected(adapted, "")
        assert heard == [{}, {}]


def test_an_adapter_that_one_rank_cannot_read_changes_no_rank(adapted_of, heard):
    adapted = adapted_of(BASES[1])
    with llm_for(adapted, lora_adapters={"mine": adapted[1]["narrow"]}, tensor_parallel_size=3) as llm:
        for name in ("unreadable", "unreadable too"):
            with pytest.raises(CheckpointError, match=r"^rank 1: /the/file is not complete$"):
                llm.engine.adapters.load(name, str(adapted[1]["wide"]))
        assert llm.adapters == ("mine",)
        assert answers(llm, "", "mine") == {**expected(adapted, ""), "mine": adapted[2]["narrow"].token_ids}
        assert [len(one) for one in heard] == [1, 1]
        llm.load_adapter("mine", adapted[1]["wide"])  # with the number that the failed one would have had
        assert answers(llm, "mine")["mine"] == expected(adapted, "wide")["wide"]


def with_experts(base, directory):
    """An adapter of attention, of the router, of all routed experts' gates and downs, and of one expert's up; and its
    oracle: the arithmetic W + scale · B A on transformers' router and fused experts."""
    config = json.loads((base.model_dir / "config.json").read_text())
    hidden, inner, draw = config["hidden_size"], config["moe_intermediate_size"], torch.Generator().manual_seed(7)

    def pair(num_outputs, num_inputs):
        return torch.randn(3, num_inputs, generator=draw) / 4, torch.randn(num_outputs, 3, generator=draw) / 4

    changes = {"model.layers.1.self_attn.q_proj": pair(hidden, hidden)}
    changes["model.layers.1.mlp.gate"] = pair(config["num_experts"], hidden)
    for expert in range(config["num_experts"]):  # layer 1 alone has routed ones
        name = f"model.layers.1.mlp.experts.{expert}"
        changes[f"{name}.gate_proj"], changes[f"{name}.down_proj"] = pair(inner, hidden), pair(hidden, inner)
    changes["model.layers.1.mlp.experts.5.up_proj"] = pair(inner, hidden)
    targets = r".*(layers\.1\.self_attn\.q_proj|mlp\.gate|experts\.\d+\.(gate|down)_proj|experts\.5\.up_proj)"
    write_adapter(directory, changes, r=3, lora_alpha=6, target_modules=targets)
    model = AutoModelForCausalLM.from_pretrained(base.model_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, (a, b) in changes.items():
            _, _, number, *path = name.split(".")
            layer, delta = model.model.layers[int(number)], 6 / 3 * (b @ a)
            if path[0] == "self_attn":
                layer.self_attn.q_proj.weight += delta
            elif path[-1] == "gate":
                layer.mlp.gate.weight += delta
            elif path[-1] == "down_proj":
                layer.mlp.experts.down_proj[int(path[2])] += delta
            else:
                start = inner * (path[-1] == "up_proj")
                layer.mlp.experts.gate_up_proj[int(path[2]), start : start + inner] += delta
    return ask(model.eval(), base.model_dir)


@pytest.fixture(scope="module")
def of_experts(adapted_of, tmp_path_factory):
    """As `adapted`, with an adapter of routed experts beside them."""
    base, directories, oracles = adapted_of(BASES[0])
    directory = tmp_path_factory.mktemp("experts") / "experts"
    oracle = with_experts(base, directory)
    return base, {**directories, "experts": directory}, {**oracles, "experts": oracle}


@pytest.mark.parametrize(("num_shards", "num_ranks"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 1), (2, 2)])
def test_routed_experts_are_adapted_where_they_are(of_experts, monkeypatch, num_shards, num_ranks):
    """With ranks, rank 0 alone has the router and its change."""
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)
    every = ("experts", "", "narrow")
    options = {"num_expert_shards": num_shards, "tensor_parallel_size": num_ranks}
    with llm_for(of_experts, **options, block_size=4) as llm:
        for prompt, logits in zip(PROMPTS, of_experts[2]["experts"].logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt, adapter="experts"), logits, atol=1e-4, rtol=0)
        for _ in range(2):
            assert answers(llm, *every) == expected(of_experts, *every)
        llm.unload_adapter("experts")
        shards = llm.experts.transport.shards.values()
        assert not any(shard.adapters.now for shard in shards)
        llm.load_adapter("again", of_experts[1]["experts"])
        assert answers(llm, "again")["again"] == of_experts[2]["experts"].token_ids


def test_an_expert_that_moves_takes_its_part_of_the_adapters_along(of_experts):
    """Half precision's kernels too: experts of the last shard move to the first, and a row has the same sums."""
    with llm_for(of_experts, dtype="bfloat16", enable_prefix_caching=False) as llm:
        before = llm.embed(PROMPTS, adapter="experts", normalize=False)
        reader = open_checkpoint(of_experts[0].model_dir)
        first, second = llm.experts.transport.shards.values()
        everything = {layer_id: range(60) for layer_id in first.layers}
        num_bytes = first.adapters.now.num_bytes + second.adapters.now.num_bytes
        first.load(reader, everything)
        second.load(reader, everything)
        assert first.adapters.now.num_bytes == second.adapters.now.num_bytes == num_bytes
        after = llm.embed(PROMPTS, adapter="experts", normalize=False)
    assert all(torch.equal(a.embedding, b.embedding) for a, b in zip(before, after, strict=True))
