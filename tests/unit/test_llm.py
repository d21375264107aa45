"""The offline API, on the demo checkpoint in one process."""

import array
import itertools
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import LLM, SamplingParams
from cluster.errors import Closed, InvalidRequest, SetupError
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SAMPLING_DEFAULTS, EngineRequest


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as made:
        yield made


GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True, logprobs=1)


def test_texts_and_token_ids_are_answered_in_their_order(llm, demo_checkpoint):
    tokenizer = Tokenizer(demo_checkpoint)
    by_text, by_ids = llm.generate(["a prompt", tokenizer.encode("a prompt")], GREEDY)
    assert by_text.prompt_token_ids == tuple(tokenizer.encode("a prompt"))
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == tokenizer.decode(by_text.token_ids)
    assert (by_text.finish_reason, len(by_text.logprobs)) == ("length", 8)


def test_greedy_tokens_are_the_best_of_the_logits_and_so_are_their_logprobs(llm):
    [output] = llm.generate([[1, 2, 3]], GREEDY)
    logits = llm.logits([1, 2, 3, *output.token_ids])
    assert logits.shape == (11, llm.info.vocab_size)
    assert logits[2:-1].argmax(dim=-1).tolist() == list(output.token_ids)
    expected = logits[2:-1].log_softmax(dim=-1).max(dim=-1).values
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in output.logprobs]), expected, atol=1e-4, rtol=0)


def test_an_answer_tells_how_much_of_its_prompt_was_in_the_cache(llm):
    """Of 41 tokens two blocks of 16."""
    prompt, params = [11 + 3 * place % 97 for place in range(41)], SamplingParams(max_tokens=1)
    [first], [second] = llm.generate([prompt], params), llm.generate([prompt], params)
    assert (first.cached_tokens, second.cached_tokens, second.usage.cached_tokens) == (0, 32, 32)


def test_each_prompt_may_have_its_own_parameters(llm):
    short, long = llm.generate(["a", "a"], [GREEDY, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)])
    assert (len(short.token_ids), len(long.token_ids)) == (8, 12)


def test_a_stop_string_ends_an_answer_and_frees_its_blocks(llm):
    [whole] = llm.generate(["stop me"], GREEDY)
    stop = whole.text[3:5]
    [output] = llm.generate(
        ["stop me"], SamplingParams(temperature=0, repetition_penalty=1, max_tokens=8, ignore_eos=True, stop=stop)
    )
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"
    assert len(output.token_ids) < 8
    llm.generate(["next"], GREEDY)
    assert llm.engine.blocks.num_used == 0


def test_defaults_come_from_the_checkpoints_generation_config(llm):
    """The demo's says 64 new tokens at most, and samples: two seeds differ."""
    one, other = llm.generate(
        ["a", "a"], [SamplingParams(seed=1, ignore_eos=True), SamplingParams(seed=2, ignore_eos=True)]
    )
    assert len(one.token_ids) == len(other.token_ids) == 64
    assert one.token_ids != other.token_ids


def test_a_lone_text_is_a_list_of_one(llm):
    assert len(llm.generate("a prompt", GREEDY)) == 1


@pytest.mark.parametrize("prompts", [[[]], [[99999]], [""], [[1] * 5000]])
def test_what_cannot_be_answered_is_refused_before_anything_runs(llm, prompts):
    with pytest.raises(InvalidRequest):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_work


def test_another_transport_is_refused(demo_checkpoint):
    with pytest.raises(SetupError, match="'pigeon'"):
        LLM(demo_checkpoint, transport="pigeon")


IDS = [1, 2, 3]


@pytest.mark.parametrize(
    "prompts",
    [
        [IDS],
        IDS,
        tuple(IDS),
        range(1, 4),
        iter(IDS),
        (token_id for token_id in IDS),
        (prompt for prompt in [IDS]),
        [iter(IDS)],
        array.array("i", IDS),
        np.array(IDS),
        [np.array(IDS, dtype=np.uint16)],
        np.array([IDS]),
        list(np.array(IDS)),
        torch.tensor(IDS),
        torch.tensor([IDS]),
        [torch.tensor(IDS)],
        list(torch.tensor(IDS)),
        {"prompt_token_ids": IDS},
        [{"prompt_token_ids": np.array(IDS), "prompt": "as it was written", "multi_modal_data": None}],
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_token_ids_in_any_kind_of_list_are_one_prompt(llm, prompts):
    """As in vLLM: whole numbers side by side are a prompt, and TokensPrompt is its mapping."""
    [output] = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
    assert output.prompt_token_ids == (1, 2, 3)
    assert {type(token_id) for token_id in output.prompt_token_ids} == {int}


def test_a_mapping_with_a_text_is_that_text(llm):
    expected = llm.generate("a prompt", GREEDY)[0].token_ids
    for prompts in ({"prompt": "a prompt"}, [{"prompt": "a prompt", "prompt_token_ids": None}]):
        assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == [expected]


def test_no_prompt_is_no_answer(llm):
    assert llm.generate([]) == llm.generate(np.zeros((0, 3), dtype=int)) == []


def test_tensors_of_different_lengths_are_a_prompt_each(llm):
    one, two = llm.generate([torch.tensor([5]), torch.tensor([1, 2])], SamplingParams(max_tokens=1))
    assert (one.prompt_token_ids, two.prompt_token_ids) == ((5,), (1, 2))


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is None"),
        (5, "prompts is 5"),
        (b"abc", "b'abc'"),
        ([b"abc"], "b'abc'"),
        (memoryview(b"abc"), "prompts is <memory"),
        ([memoryview(b"abc")], r"prompts\[0\] is <memory"),
        ({"prompt_token_ids": memoryview(b"abc")}, "a list of token ids"),
        ({"a", "b"}, "prompts is"),
        ([None], r"prompts\[0\] is None"),
        (["a", 5], r"prompts\[1\] is 5"),
        ([1, "a"], "'a' at position 1"),
        ([[1, 2.0]], "2.0 at position 1"),
        ([[True]], "True at position 0"),
        ([["1"]], "'1' at position 0"),
        ([[[1]]], r"\[1\] at position 0"),
        ([[10**5000]], "bits at position 0"),
        ([[-1]], "-1 at position 0"),
        (np.array([0.5]), r"prompts\[0\] is 0.5"),
        (np.array(5), "prompts is 5"),
        (torch.zeros(2, 2), "0.0 at position 0"),
        ([{1, 2}], "prompts"),
        ({"prompt": None}, "neither"),
        ({"prompt": 5}, "neither"),
        ({"prompt_token_ids": "abc"}, "'abc'"),
        ({"prompt_token_ids": {3, 1}}, "a list of token ids"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
        ([{"role": "user", "content": "a"}], "'role'"),
        ("\ud800", "lone surrogate"),
        (itertools.count(), "tokens"),
        ([itertools.count()], "tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_prompt_that_is_none_is_refused_with_its_place(llm, prompts, words):
    with pytest.raises(InvalidRequest, match=words) as refusal:
        llm.generate(prompts)
    assert refusal.value.field


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 2},
        [{"max_tokens": 2}],
        ({"max_tokens": 2} for _ in range(1)),
        SamplingParams(max_tokens=2),
        (SamplingParams(max_tokens=2),),
    ],
)
def test_parameters_may_be_a_mapping_or_any_list(llm, params):
    [output] = llm.generate("a prompt", params)
    assert len(output.token_ids) <= 2


@pytest.mark.parametrize(
    ("params", "field"),
    [("greedy", "params"), (5, "params"), (np.array(1), "params"),
     ([5], "params"), ([], "params"), ({"best_of": 2}, "params"),
     (itertools.repeat({}), "params"),
     ({5: 2}, "params"), ({"top_p": 2}, "top_p"), ([None, None], "params"), (set(), "params"),
     ({"stop_token_ids": ["a"]}, "stop_token_ids"), ({"stop_token_ids": [10**9]}, "stop_token_ids")],
)  # fmt: skip
def test_parameters_that_are_none_are_refused_with_their_field(llm, params, field):
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate("a prompt", params)
    assert refusal.value.field == field


def test_a_stop_string_without_a_tokenizer_is_refused(demo_checkpoint):
    """There is no text in which it could be found: the answer would go on for ever."""
    with LLM(demo_checkpoint, skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        with pytest.raises(InvalidRequest, match=r"stop needs the tokenizer.*stop_token_ids") as refusal:
            llm.generate(IDS, {"stop": "a"})
        assert refusal.value.field == "stop"
        assert llm.generate(IDS, {"stop": [], "max_tokens": 1})[0].finish_reason == "length"


def test_an_endless_iterator_of_parameters_is_said_to_have_too_many(llm):
    with pytest.raises(InvalidRequest, match="more than 1 SamplingParams for 1 prompts"):
        llm.generate("a prompt", itertools.repeat({}))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 5) | st.floats() | st.text() | st.binary()
    | st.sampled_from([np.int64(1), np.bool_(True), np.array(1), torch.tensor(1), torch.tensor([1, 2]), np.ones(2)])
    | st.sampled_from([object(), int, np.array([[1, 2]]), np.array([1, None]), torch.empty(2, device="meta")]),
    lambda parts: st.lists(parts, max_size=4) | st.lists(parts, max_size=3).map(iter)
    | st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "x"]), parts, max_size=2),
    max_leaves=12,
)  # fmt: skip


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_any_value_as_prompts_is_answered_or_refused(llm, prompts):
    with suppress(InvalidRequest):
        assert all(len(output.token_ids) == 1 for output in llm.generate(prompts, SamplingParams(max_tokens=1)))
    assert not llm.engine.has_work


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_as_parameters_is_taken_or_refused(llm, params):
    with suppress(InvalidRequest):
        llm.generate([], params)


def test_a_temperature_near_zero_is_greedy_and_a_low_one_takes_no_last_token(llm):
    """1e-40 made all logits infinite, their probabilities NaN, and the token the vocabulary's last one."""
    greedy = llm.generate([IDS], GREEDY)[0].token_ids
    for temperature in (1e-40, 5e-324, 9e-6, 2e-5):
        params = SamplingParams(temperature=temperature, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)
        assert llm.generate([IDS], params)[0].token_ids == greedy


def test_logits_of_a_prompt_as_long_as_the_context(llm):
    """The first positions' are those of the shorter prompt; one more token than the context is refused."""
    limit = llm.info.max_model_len
    ids = [position % 1000 for position in range(limit)]
    logits = llm.logits(ids)
    assert logits.shape == (limit, llm.info.vocab_size)
    torch.testing.assert_close(logits[:50], llm.logits(np.array(ids[:50])), atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidRequest, match=f"{limit + 1} tokens, the context has {limit}"):
        llm.logits([*ids, 1])
    with pytest.raises(InvalidRequest, match="leave room for an answer"):
        llm.generate([ids])


def test_logits_beside_a_running_request_are_those_alone_and_leave_its_answer(llm, monkeypatch):
    """Its steps are those of every sequence: the other one goes on in them."""
    expected = llm.generate([[7, 8, 9]], GREEDY)[0].token_ids
    alone = llm.logits(range(1, 60))
    token_ids, step = [], llm.engine.step

    def watched():
        updates = step()
        token_ids.extend(token for update in updates if update.request_id == "beside" for token in update.token_ids)
        return updates

    monkeypatch.setattr(llm.engine, "step", watched)
    llm.engine.submit(
        EngineRequest(request_id="beside", prompt_token_ids=(7, 8, 9), params=GREEDY.with_defaults(SAMPLING_DEFAULTS))
    )
    torch.testing.assert_close(llm.logits(range(1, 60)), alone, atol=1e-4, rtol=1e-4)
    while llm.engine.has_work:
        llm.engine.step()
    assert tuple(token_ids) == expected


@pytest.mark.parametrize("token_ids", ["text", None, [], [[1]], b"a", 5, [10**9]])
def test_logits_of_no_prompt_are_refused(llm, token_ids):
    with pytest.raises(InvalidRequest) as refusal:
        llm.logits(token_ids)
    assert refusal.value.field == "token_ids"


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_dir": None}, {"model_dir": 5}, {"model_dir": b"model"}, {"model_dir": "a\0b"}, {"model_dir": ""},
        {"num_expert_shards": "2"}, {"num_expert_shards": 1.5}, {"num_expert_shards": True}, {"num_expert_shards": -1},
        {"kv_cache_bytes": "1GiB"}, {"kv_cache_bytes": 1e8}, {"block_size": -(10**5000)}, {"block_size": "x"},
        {"max_num_seqs": None}, {"max_num_seqs": float("nan")}, {"max_model_len": 1.5}, {"max_model_len": True},
        {"max_num_batched_tokens": [1]}, {"enable_prefix_caching": "no"}, {"skip_tokenizer": "no"},
        {"dtype": torch.bfloat16}, {"dtype": ["float32"]}, {"device": torch.device("cpu")}, {"transport": ["local"]},
        {"cpus_per_expert_shard": "1", "transport": "ray"}, {"gpus_per_expert_shard": "1", "transport": "ray"},
        {"cpus_per_expert_shard": 0}, {"cpus_per_expert_shard": "1"}, {"gpus_per_expert_shard": -1},
        {"num_expert_shards": 0},
    ],
    ids=lambda arguments: "-".join(arguments),
)  # fmt: skip
def test_arguments_of_no_use_are_set_up_errors(demo_checkpoint, arguments):
    with pytest.raises(SetupError) as refusal:
        LLM(**{"model_dir": demo_checkpoint} | arguments)
    assert len(str(refusal.value).splitlines()) == 1


def test_numpys_numbers_are_numbers_here_too(demo_checkpoint):
    sizes = {"kv_cache_bytes": np.int64(4 << 20), "max_num_seqs": np.int32(2), "num_expert_shards": np.uint8(2)}
    with LLM(demo_checkpoint, dtype="float32", **sizes) as made:
        assert len(made.generate([IDS], GREEDY)[0].token_ids) == 8


def test_a_closed_one_says_so_whatever_computes_its_experts(demo_checkpoint):
    made = LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20)
    made.close()
    made.close()
    for call in (lambda: made.generate("a"), lambda: made.logits([1]), made.__enter__):
        with pytest.raises(Closed, match="this LLM is closed"):
            call()
