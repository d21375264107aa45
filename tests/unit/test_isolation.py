"""An exception at one sequence's rows ends that one: injected at every stage of a step, on the demo checkpoint."""

import asyncio
from dataclasses import replace

import pytest
from engine_fakes import make_engine, request, run_to_end
from serving_fakes import EchoBackend, byte_ids, make_service, write_tokenizer

from cluster import LLM, SamplingParams
from cluster.engine import runner as runner_module
from cluster.engine.block_manager import BlockManager
from cluster.engine.engine import Engine
from cluster.engine.isolation import failure_of
from cluster.engine.loop import EngineLoop
from cluster.engine.runner import ModelRunner
from cluster.engine.sequence import Sequence
from cluster.errors import ClusterError, InvalidRequest, RequestFailed, ShardUnavailable
from cluster.model import sampler
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer

POISON = 666  # the seed of the one that meets the exception
NUM_TOKENS = 6


class Bug(Exception):
    """An exception that nobody expected."""


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20, block_size=4) as made:
        yield made


def params(seed, **others):
    values = {
        "temperature": 0.9, "repetition_penalty": 1.2, "logprobs": 2, "max_tokens": NUM_TOKENS, "ignore_eos": True,
    }  # fmt: skip
    return SamplingParams(seed=seed, **{**values, **others})


PROMPTS = [[1, 2, 3], [4] * 9, [7, 8, 9, 10, 11], [12]]
SEEDS = [1, POISON, 2, 3]
POISONED = SEEDS.index(POISON)


def at_method(owner, name, find):
    """The exception in place of a call of owner.name whose arguments have the poisoned sequence, late enough."""

    def install(monkeypatch, num_before):
        original = getattr(owner, name)

        def hooked(*arguments, **options):
            if any(is_poisoned(found, num_before) for found in find(*arguments, **options)):
                raise Bug(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, hooked)

    return install


def is_poisoned(sequence, num_before):
    return sequence.params.seed == POISON and sequence.num_output_tokens >= num_before


class OfRow:
    """A sampler's row as a sequence."""

    def __init__(self, row):
        self.params, self.num_output_tokens = row.params, len(row.token_ids) - row.num_prompt_tokens


def at_rules(name, numbers):
    """The exception in place of a call that has rows' rules, or some of them: `numbers` finds these."""

    def install(monkeypatch, num_before):
        rows, rule_of, choose = [], sampler.rule_of, sampler.choose

        def watched(row, vocab_size):
            rows.append(row)
            return rule_of(row, vocab_size)

        def chosen(logits, rules):
            del rows[: len(rows) - len(rules)]  # what is left of it are this call's
            return choose(logits, rules)

        monkeypatch.setattr(sampler, "rule_of", watched)
        monkeypatch.setattr(sampler, "choose", chosen)
        at_method(sampler, name, lambda *given: [OfRow(rows[i]) for i in numbers(*given)])(monkeypatch, num_before)

    return install


def at_device_index(monkeypatch, num_before):
    """As the issue tells it: an id that the vocabulary does not have is banned below min_tokens."""

    def row_of(sequence, *rest):
        made = original(sequence, *rest)
        return replace(made, banned_token_ids=(151643,)) if is_poisoned(sequence, num_before) else made

    original = runner_module._sampling_row
    monkeypatch.setattr(runner_module, "_sampling_row", row_of)


STAGES = {
    "finding blocks again": at_method(BlockManager, "reuse", lambda _, sequence: [sequence]),
    "allocating blocks": at_method(BlockManager, "allocate", lambda _, sequence, __: [sequence]),
    "making tensors": at_method(ModelRunner, "_arrays", lambda _, part: [s.sequence for s in part]),
    "the model's step": at_method(ModelRunner, "forward", lambda _, scheduled, **__: [s.sequence for s in scheduled]),
    "what the sampler needs": at_method(runner_module, "_sampling_row", lambda sequence, *_: [sequence]),
    "banned ids": at_device_index,
    "penalties": at_method(sampler, "penalties_of", lambda row, _: [OfRow(row)]),
    "drawing": at_rules("choose", lambda _, rules: range(-len(rules), 0)),
    "log-probabilities": at_rules("_logprobs", lambda _, row, __: [row]),
    "remembering blocks": at_method(BlockManager, "remember", lambda _, sequence: [sequence]),
    "taking the token in": at_method(Engine, "_advance", lambda _, scheduled, *__: [scheduled.sequence]),
    "finding the end": at_method(Sequence, "end", lambda sequence: [sequence]),
}


def generate(llm):
    return llm.generate(PROMPTS, [params(seed) for seed in SEEDS])


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_at_one_sequence_ends_it_alone_and_the_others_tokens_stay(llm, monkeypatch, stage, num_before):
    if stage == "finding blocks again":
        num_before = 0  # a sequence looks for them when it begins
    expected = generate(llm)
    with monkeypatch.context() as patched:
        STAGES[stage](patched, num_before)
        with pytest.raises(
            RequestFailed, match=r"request llm-\d+ met an exception of its own.*(Bug|IndexError)"
        ) as met:
            generate(llm)
    outputs = met.value.outputs
    assert outputs.pop(POISONED) is None
    for output, other in zip(outputs, expected[:POISONED] + expected[POISONED + 1 :], strict=True):
        assert (output.token_ids, output.text) == (other.token_ids, other.text)
        assert [entry.logprob for entry in output.logprobs] == pytest.approx(
            [entry.logprob for entry in other.logprobs], abs=1e-4
        )
    assert llm.engine.blocks.num_used == 0
    assert not llm.engine.has_work
    assert [output.token_ids for output in generate(llm)] == [output.token_ids for output in expected]


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_at_the_only_sequence_ends_no_engine(llm, monkeypatch, stage):
    with monkeypatch.context() as patched:
        STAGES[stage](patched, 0)
        with pytest.raises(RequestFailed):
            llm.generate([[1, 2]], params(POISON))
    assert len(llm.generate([[1, 2]], params(POISON))[0].token_ids) == NUM_TOKENS


def test_text_that_cannot_be_made_ends_its_answer_alone(llm, monkeypatch):
    expected = generate(llm)
    poisoned = expected[POISONED].token_ids[3]
    assert all(poisoned not in output.token_ids for output in expected if output is not expected[POISONED])
    original = Tokenizer.token_bytes

    def token_bytes(self, token_id, skip_special_tokens=True):
        if token_id == poisoned:
            raise Bug("no such text")
        return original(self, token_id, skip_special_tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "token_bytes", token_bytes)
        with pytest.raises(RequestFailed, match="Bug: no such text") as met:
            generate(llm)
    assert [output and output.text for output in met.value.outputs] == [
        None if output is expected[POISONED] else output.text for output in expected
    ]
    assert llm.engine.blocks.num_used == 0


def test_a_service_ends_the_request_whose_text_cannot_be_made_and_streams_the_other(tmp_path, monkeypatch):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    backend = EchoBackend()
    service = make_service(tokenizer, backend)
    original = tokenizer.token_bytes
    bad = byte_ids("x")[0]

    def token_bytes(token_id, skip_special_tokens=True):
        if token_id == bad:
            raise Bug("no such text")
        return original(token_id, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "token_bytes", token_bytes)

    async def both():
        asked = [service.generate(Prompt(token_ids=byte_ids(text)), SamplingParams(), request_id=text)
                 for text in ("abc", "axc")]  # fmt: skip
        return await asyncio.gather(*asked, return_exceptions=True)

    good, failed = asyncio.run(both())
    assert good.text == "abc"
    assert isinstance(failed, Bug)
    assert backend.closed == ["axc"], "its sequence ends too"


class FaultyRunner:
    """As CountingRunner, but a step with one of `bad` raises; counts the sequences of every try."""

    def __init__(self, runner, bad, error):
        self.runner, self.bad, self.error, self.tries, self.broken = runner, bad, error, [], False
        self.recovery_timeout_s = runner.recovery_timeout_s

    def has_news(self, epoch):
        return self.runner.has_news(epoch)

    def check_device(self):
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def run(self, batch):
        self.tries.append([s.sequence.request_id for s in batch.scheduled])
        if self.bad is None or self.bad & set(self.tries[-1]):
            raise self.error
        return self.runner.run(batch)


def faulty_engine(bad, error=None, **options):
    engine = make_engine(**options)
    engine.runner = FaultyRunner(engine.runner, bad, error or Bug("index out of range"))
    return engine


def test_the_culprit_of_a_step_is_found_in_halves():
    engine = faulty_engine({"f"})
    for name in "abcdefgh":
        engine.submit(request(name, max_tokens=1))
    answers = run_to_end(engine)
    assert engine.runner.tries == [[*"abcdefgh"], [*"abcd"], [*"efgh"], [*"ef"], ["e"], ["f"], [*"gh"]]
    assert answers == {name: ([], "error") if name == "f" else ([2], "length") for name in "abcdefgh"}


def test_what_a_part_of_a_step_that_is_run_again_loses_is_held():
    engine = faulty_engine({"a"})
    for name in "abc":
        engine.submit(request(name, max_tokens=1))
    engine.runner.runner.lost = {"c"}
    updates = {update.request_id: update for update in engine.step()}
    assert {name: update.finish_reason for name, update in updates.items()} == {"a": "error", "b": "length"}
    assert engine.stats().held == 1
    engine.runner.runner.lost, engine.runner.runner.epoch = set(), 2
    assert run_to_end(engine) == {"c": ([2], "length")}


def test_each_of_several_culprits_gets_its_own_error():
    engine = faulty_engine({"a", "c"})
    for name in "abc":
        engine.submit(request(name, max_tokens=1))
    errors = {update.request_id: update.error for update in engine.step()}
    assert str(errors["a"]) == "request a met an exception of its own, the others go on: Bug: index out of range"
    assert "request c met" in str(errors["c"])
    assert (errors["a"].grpc_code, errors["a"].public, errors["b"]) == ("INTERNAL", False, None)


def test_a_device_that_is_broken_ends_the_engine():
    engine = faulty_engine({"a"})
    engine.runner.broken = True
    engine.submit(request("a"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()


def test_an_engine_that_fails_at_a_token_of_its_own_too_ends():
    """Everything raises: no request is to blame, and another engine shall have them."""
    engine = faulty_engine(None)
    engine.submit(request("a"))
    engine.submit(request("b"))
    with pytest.raises(Bug):
        engine.step()
    assert engine.runner.tries == [["a", "b"], ["a"], ["b"], ["proof"]]


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_poisoned_requests_one_after_the_other_end_no_engine(num_blocks):
    engine = faulty_engine({"a", "b", "c", "d"}, num_blocks=num_blocks)
    for name in "abcd":
        engine.submit(request(name, max_tokens=2))
        assert run_to_end(engine) == {name: ([], "error")}
    engine.submit(request("e", max_tokens=2))
    assert run_to_end(engine) == {"e": ([2, 3], "length")}


def test_a_shard_that_fails_at_one_sequences_rows_is_no_reason_to_end_the_others():
    """Nothing is unavailable: the shard answered with the exception that it met, and would meet it anywhere."""
    engine = faulty_engine({"b"}, ClusterError("shard 3 failed: IndexError()"))
    for name in "abc":
        engine.submit(request(name, max_tokens=1))
    answers = run_to_end(engine)
    assert answers == {"a": ([2], "length"), "b": ([], "error"), "c": ([2], "length")}


def test_a_lost_shard_in_the_engines_own_token_is_no_fault_of_the_engine():
    engine = faulty_engine(None, ShardUnavailable("shard 1 is gone", 1))
    engine.submit(request("a"))
    [update] = engine.step()
    assert isinstance(update.error, ShardUnavailable)


def test_a_request_that_cannot_even_be_queued_ends_alone(monkeypatch):
    engine = make_engine()
    submit = engine.submit

    def raising(asked):
        if asked.request_id == "b":
            raise Bug("no such client")
        submit(asked)

    monkeypatch.setattr(engine, "submit", raising)
    loop = EngineLoop(engine)
    loop.submit([request("a", max_tokens=1), request("b"), request("c", max_tokens=1)])
    loop.start()
    ends, received = {}, 0
    while len(ends) < 3:
        received, news = loop.poll(10, received)
        ends.update({update.request_id: update for update in news})
    loop.stop()
    assert {name: update.finish_reason for name, update in ends.items()} == {"a": "length", "b": "error", "c": "length"}
    assert isinstance(ends["b"].error, RequestFailed)


def test_a_request_is_on_record_before_it_is_taken_in(monkeypatch):
    """It may end the process there."""
    engine, happened = make_engine(), []
    submit = engine.submit
    monkeypatch.setattr(engine, "on_step", lambda names: happened.append(tuple(names)))
    monkeypatch.setattr(engine, "submit", lambda asked: happened.append("taken in") or submit(asked))
    loop = EngineLoop(engine)
    loop.submit([request("a", max_tokens=1)])
    loop.start()
    loop.poll(10, 0)
    loop.stop()
    assert happened == [("a",), "taken in", ("a",)]


def test_an_interrupt_is_no_exception_of_a_row(llm, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm)
    assert len(generate(llm)) == len(PROMPTS)


def test_ends_for_which_no_token_is_left_are_the_callers_fault(llm):
    """min_tokens bans what ends the answer, and here everything does."""
    every = range(llm.info.vocab_size)
    for temperature in (0, 1.0):
        with pytest.raises(InvalidRequest, match="leaves no token to choose"):
            llm.generate([[1]], SamplingParams(temperature=temperature, min_tokens=1, stop_token_ids=every))


def test_an_error_is_raised_when_the_others_have_ended(llm):
    every = range(llm.info.vocab_size)
    bad = SamplingParams(min_tokens=1, stop_token_ids=every)
    with pytest.raises(ClusterError) as met:
        llm.generate([[1], [2]], [bad, params(1)])
    failed, output = met.value.outputs
    assert failed is None
    assert output.token_ids == llm.generate([[2]], params(1))[0].token_ids


def test_an_exception_of_many_lines_is_one_for_the_client():
    error = failure_of("a", RuntimeError("CPU kernel:\n  size mismatch\n" + "frame\n" * 1000))
    assert str(error).startswith(
        "request a met an exception of its own, the others go on: RuntimeError: CPU kernel: size"
    )
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 600
