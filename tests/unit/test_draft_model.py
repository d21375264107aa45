"""Drafts by a small model: the same tokens as without, its cache, and which models are refused."""

import json

import pytest
from configs import config, dense
from drafters import Always, always
from engine_fakes import Clock, CountingRunner, DraftedRunner, block_manager, request, run_to_end

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.cli import main
from cluster.config import EngineConfig
from cluster.engine.draft_model import DraftModel
from cluster.engine.engine import Engine
from cluster.engine.speculation import SpeculatingRunner
from cluster.errors import CheckpointError, SetupError
from cluster.metrics import EngineMetrics, new_registry

PROMPTS = [[11, 12, 13, 11, 12], list(range(40, 70)), [7, 8, 9], [3]]
KINDS = [
    SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, repetition_penalty=1.2, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=2, top_k=20, repetition_penalty=1.0, max_tokens=14, min_tokens=14),
    SamplingParams(temperature=0, frequency_penalty=0.4, logit_bias={5: 2.0}, max_tokens=14, ignore_eos=True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A MoE model, and a dense one of the same vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "moe", config(), seed=1)
    write_checkpoint(folder / "small", dense(num_hidden_layers=2), seed=2)
    write_checkpoint(folder / "narrow", dense(vocab_size=210), seed=2)
    return folder


def drafting(models, draft="small", num=4):
    return {"method": "draft_model", "model": str(models / draft), "num_speculative_tokens": num}


def make(model_dir, **options):
    return LLM(
        model_dir, dtype="float32", device="cpu", skip_tokenizer=True,
        **{"kv_cache_bytes": 1 << 22, "block_size": 4, **options},
    )  # fmt: skip


def answers(llm):
    return [output.token_ids for output in llm.generate(PROMPTS, KINDS)]


@pytest.fixture(scope="module")
def plain(models):
    found = {}
    for name in ("moe", "small"):
        with make(models / name) as llm:
            found[name] = answers(llm)
    return found


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 9, "max_num_seqs": 3}, {"kv_cache_bytes": 32_000}])
def test_answers_are_those_without_a_draft_model(models, plain, limits):
    """The last limit leaves room for 48 tokens in each cache: sequences give way, and mirrors too."""
    with make(models / "moe", speculative_config=drafting(models), **limits) as llm:
        payoff = always(llm)
        assert answers(llm) == plain["moe"]
        assert answers(llm) == plain["moe"], "from cached beginnings, in both caches"
        assert sum(payoff.tried)
        assert llm.engine.blocks.num_used == 0


def test_a_model_that_drafts_for_itself_is_always_right(models, plain):
    """Sampled tokens too: it draws them with the same seeds, penalties and limits. 14 tokens are the prompt's step,
    then 5, 5 and 3."""
    with make(models / "small", speculative_config=drafting(models)) as llm:
        payoff = always(llm)
        assert answers(llm) == plain["small"]
        stats = llm.engine.stats()
        assert stats.drafted_tokens == stats.accepted_tokens >= 40
        assert len(payoff.tried) <= 4


def test_both_caches_share_the_memory(models):
    with make(models / "moe") as llm:
        alone = llm.engine.runner.cache.num_bytes
    with make(models / "moe", speculative_config=drafting(models)) as llm:
        runner = llm.engine.runner
        both = runner.runner.cache.num_bytes + runner.drafter.runner.cache.num_bytes
        assert alone * 0.98 <= both <= 1 << 22
        tokens = [manager.num_blocks for manager in (llm.engine.blocks, runner.drafter.blocks)]
        assert abs(tokens[0] - tokens[1]) <= 1


@pytest.mark.parametrize(
    ("target", "given_config", "named"),
    [
        ("moe", {"model": "narrow"}, "narrow has a vocabulary of 210 tokens, and the one that is served has 211"),
        ("moe", {"model": "moe"}, "moe has routed experts: a dense one that generates is needed"),
        ("moe", {}, "speculative_config: model is None, the draft model's directory or name is needed"),
        ("moe", {"model": " "}, "model is ' ', the draft model's directory"),
        ("moe", {"model": "nowhere"}, "nowhere"),
    ],
)
def test_a_model_that_cannot_draft_is_refused_before_anything_loads(models, target, given_config, named, monkeypatch):
    monkeypatch.setattr("cluster.llm.load_engine", None)
    if given_config.get("model", " ").strip():
        given_config = {"model": str(models / given_config["model"])}
    with pytest.raises((SetupError, CheckpointError)) as raised:
        make(models / target, speculative_config={"method": "draft_model", **given_config})
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_ngram_needs_no_model():
    with pytest.raises(SetupError, match="model is 'x', which is for method draft_model only"):
        EngineConfig(speculative_config={"method": "ngram", "model": "x"})


def test_the_plan_shows_the_draft_models_memory(models, capsys):
    """As much as that model's own plan."""
    asked = json.dumps(drafting(models))
    assert main(["plan", str(models / "small"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main(["plan", str(models / "moe"), "--json", "--speculative-config", asked]) == 0
    draft = json.loads(capsys.readouterr().out)["draft_model"]
    assert draft == {
        "parameters": alone["parameters"],
        "bytes": alone["attention_replica_bytes"],
        "kv_bytes_per_token": alone["kv_bytes_per_token"],
    }
    assert main(["plan", str(models / "moe"), "--speculative-config", asked]) == 0
    assert "draft model: " in capsys.readouterr().out


def engine_of(draft_runner, num_draft_blocks=64, max_model_len=1000, **limits):
    limits = EngineConfig(block_size=4, **limits)
    drafter = DraftModel(
        draft_runner, block_manager(num_draft_blocks, limits), max_rows=limits.max_num_batched_tokens,
        max_model_len=max_model_len, max_mirrors=limits.max_num_seqs,
    )  # fmt: skip
    runner = SpeculatingRunner(DraftedRunner(), drafter, Always(), num_ahead=3, max_rows=limits.max_num_batched_tokens)
    return Engine(
        runner, limits, blocks=block_manager(64, limits), eos_token_ids=(0,), max_model_len=1000,
        metrics=EngineMetrics(new_registry(), "test"), clock=Clock(),
    )  # fmt: skip


def test_the_small_model_computes_the_prompt_once_and_then_what_is_new():
    """Prompt of 10, its step brings token 10. The small model computes 11 tokens for its first of three guesses. All
    are right and one more came, so it lacks two."""
    draft_runner = CountingRunner()
    engine = engine_of(draft_runner)
    engine.submit(request("a", range(10), max_tokens=10))
    assert run_to_end(engine) == {"a": (list(range(10, 20)), "length")}
    assert [step[0][1] for step in draft_runner.steps] == [11, 1, 1, 2, 1, 1]


def test_a_long_prompt_is_caught_up_a_chunk_a_step():
    """Of 8 rows: the prompt of 30 takes four steps. Then each brings a token, until the small model has all 35."""
    draft_runner = CountingRunner()
    engine = engine_of(draft_runner, max_num_batched_tokens=8)
    engine.submit(request("a", range(30), max_tokens=12))
    assert run_to_end(engine) == {"a": (list(range(30, 42)), "length")}
    assert [step[0][1] for step in draft_runner.steps][:5] == [8, 8, 8, 8, 3]


def test_mirrors_give_way_to_others_and_come_back():
    """Five blocks of 4: room for one mirror of 12 tokens at a time."""
    engine = engine_of(CountingRunner(), num_draft_blocks=5)
    for name in ("a", "b", "c"):
        engine.submit(request(name, range(10), max_tokens=8))
    assert run_to_end(engine) == {name: (list(range(10, 18)), "length") for name in ("a", "b", "c")}
    assert engine.stats().accepted_tokens


def test_past_the_small_models_context_there_are_no_drafts():
    draft_runner = CountingRunner()
    engine = engine_of(draft_runner, max_model_len=14)
    engine.submit(request("a", range(10), max_tokens=10))
    assert run_to_end(engine) == {"a": (list(range(10, 20)), "length")}
    assert sum(step[0][1] for step in draft_runner.steps) == 13
