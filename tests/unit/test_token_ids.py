"""Token ids outside the vocabulary, wherever they come from, and more log-probabilities than it has tokens."""

import json
import shutil

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.checkpoint.generation import read_eos_token_ids
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.errors import CheckpointError, InvalidRequest
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import SamplingRow, sample
from cluster.types import SAMPLING_DEFAULTS


def changed(demo_checkpoint, folder, file, **keys):
    shutil.copytree(demo_checkpoint, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [[1023, 1021, 151643], 1024])
def test_an_end_id_outside_the_vocabulary_is_refused_at_load_by_its_file_and_key(demo_checkpoint, tmp_path, file, ids):
    folder = changed(demo_checkpoint, tmp_path / "demo", file, eos_token_id=ids)
    wrong = ids if isinstance(ids, int) else ids[-1]
    with pytest.raises(CheckpointError, match=rf"{file}: eos_token_id has {wrong}, ids from 0 to 1023 are needed"):
        LLM(folder)


def test_the_tokenizers_end_id_outside_the_vocabulary_is_refused_too(demo_checkpoint, tmp_path):
    folder = changed(demo_checkpoint, tmp_path / "demo", "tokenizer_config.json", eos_token="<|end|>")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 1024, "content": "<|end|>"})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"eos_token.* has 1024, ids from 0 to 1023 are needed"):
        LLM(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_nothing_is_computed_with_are_no_reason_to_refuse(demo_checkpoint, tmp_path, file):
    """transformers takes a pad id of -1, and a bos id that no prompt has."""
    folder = changed(demo_checkpoint, tmp_path / "demo", file, bos_token_id=151643, pad_token_id=-1)
    ids = read_eos_token_ids(folder, CheckpointReader(folder).config)
    assert ids == read_eos_token_ids(demo_checkpoint, CheckpointReader(demo_checkpoint).config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, demo_checkpoint):
    """A model of 16 tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = json.loads((demo_checkpoint / "config.json").read_text())
    write_checkpoint(folder, config | {"vocab_size": 16, "eos_token_id": 15}, seed=0)
    with LLM(folder, dtype="float32", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        yield llm


@pytest.mark.parametrize("num_asked", [1, 16, 20])
def test_log_probabilities_beyond_the_vocabulary_are_those_of_all_its_tokens(tiny, num_asked):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=3, ignore_eos=True, logprobs=num_asked)
    [output] = tiny.generate([[1, 2]], params)
    expected = tiny.logits([1, 2]).log_softmax(dim=-1)[-1]
    assert [len(entry.top) for entry in output.logprobs] == [min(num_asked, 16)] * 3
    best = expected.argsort(descending=True).tolist()
    assert [token_id for token_id, _ in output.logprobs[0].top] == best[:num_asked]
    torch.testing.assert_close(
        torch.tensor([value for _, value in output.logprobs[0].top]), expected[best[:num_asked]], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("num_asked", [0, 3, 20])
def test_the_sampler_gives_as_many_log_probabilities_as_there_are(num_asked):
    params = SamplingParams(temperature=0, logprobs=num_asked).with_defaults(SAMPLING_DEFAULTS)
    row = SamplingRow(token_ids=[1], num_prompt_tokens=1, params=params, penalties=PenaltyState())
    [(_, logprobs)] = sample(torch.zeros(1, 5), [row])
    assert len(logprobs.top) == min(num_asked, 5)


def test_a_top_k_beyond_the_vocabulary_keeps_all(tiny):
    one, other = tiny.generate(
        [[1, 2]] * 2, [SamplingParams(seed=3, top_k=k, max_tokens=8, ignore_eos=True) for k in (0, 1000)]
    )
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1, 16], {}, "has 16 at position 1, the vocabulary ends at 15"),
        ([-1], {}, "has -1 at position 0, the vocabulary ends at 15"),
        ([1], {"stop_token_ids": [3, 151643], "min_tokens": 1}, "stop_token_ids has 151643 at position 1"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids is -1, it must be at least 0"),
        ([1], {"seed": -1}, "seed is -1, it must be at least 0 and at most 9223372036854775807"),
        ([1], {"top_k": 2**31}, "top_k is 2147483648, it must be at least 0 and at most 2147483647"),
    ],
)
def test_a_requests_ids_outside_the_vocabulary_are_refused(tiny, prompt, params, message):
    with pytest.raises(InvalidRequest, match=message):
        tiny.generate([prompt], SamplingParams(**params))
    assert not tiny.engine.has_work


def test_min_tokens_with_every_end_of_the_checkpoint_bans_those(tiny):
    [output] = tiny.generate([[1, 2]], SamplingParams(seed=1, temperature=5.0, min_tokens=40, max_tokens=40))
    assert len(output.token_ids) == 40
    assert 15 not in output.token_ids
