"""The benchmark's named samplings, and that each system gets the same settings."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.bench.arguments import add_arguments
from cluster.bench.checkpoint import made_checkpoint, read_config
from cluster.bench.foreign_system import ForeignSystem
from cluster.bench.llama_worker import _Chooser
from cluster.bench.sampling import GREEDY, SAMPLINGS, find_samplings
from cluster.bench.spec import SystemSpec
from cluster.bench.systems import build_system
from cluster.bench.throughput import Workload
from cluster.errors import CheckpointError

WORKLOAD = Workload(batches=(2,), prompt_tokens=4, output_tokens=3, repeats=1, vocab_size=50)
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_checkpoint("demo", 0, tmp_path_factory.mktemp("made"), lambda made, total: None)


def test_chat_is_what_the_familys_chat_models_ship() -> None:
    """generation_config.json of Qwen1.5-MoE-A2.7B-Chat, as docs and the issue quote it."""
    first, second = SAMPLINGS["chat"].params(2, 7)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert (first.max_tokens, first.ignore_eos, first.logprobs) == (7, True, None)
    assert (first.seed, second.seed) == (0, 1)


def test_greedy_pays_for_nothing_else() -> None:
    [params] = GREEDY.params(1, 5)
    assert params.greedy
    assert not params.has_penalties
    assert params.logprobs is None


def test_the_checkpoints_own_is_read_from_its_file(tmp_path: Path) -> None:
    """Without a file, or with `do_sample` false, it is what a request without parameters gets."""
    assert find_samplings(["checkpoint"], tmp_path)[0].temperature == 1.0
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1}))
    greedy, found = find_samplings(["greedy", "checkpoint"], tmp_path)
    assert greedy is GREEDY
    assert found.describe() == "checkpoint (temperature 0.5, top_p 0.9, top_k 7, repetition_penalty 1.1)"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.5}))
    assert find_samplings(["checkpoint"], tmp_path)[0].greedy
    file.write_text(json.dumps({"top_p": 2}))
    with pytest.raises(CheckpointError, match="top_p"):
        find_samplings(["checkpoint"], tmp_path)


@pytest.mark.parametrize("part", ["throughput", "latency", "serve"])
def test_the_help_lists_every_sampling(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([part, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for sampling in SAMPLINGS.values():
        assert sampling.describe() in text


FAKE_VLLM = """
import importlib.util, json, os
__version__ = "fake"
assert importlib.util.find_spec("kernels") is None, "the bench's own folder, which transformers would take for another"

class SamplingParams:
    def __init__(self, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, logprobs=None,
                 seed=None, max_tokens=16, ignore_eos=False, detokenize=True):
        self.fields = {name: value for name, value in locals().items() if name != "self"}

class LLM:
    def __init__(self, *, model, dtype, max_model_len, max_num_seqs, skip_tokenizer_init, enable_prefix_caching):
        pass  # the options that vLLM 0.32 knows: it refuses others

    def generate(self, prompts, params, use_tqdm):
        with open(os.environ["SEEN"], "a") as file:
            for one in params:
                print(json.dumps(one.fields), file=file)
        class One:
            def __init__(self, n): self.outputs, self.token_ids = [self], range(n)
        return [One(one.fields["max_tokens"]) for one in params]
"""


def test_vllm_gets_the_settings_and_a_seed_for_each_prompt(tmp_path: Path, demo_dir: Path) -> None:
    """A module of that name stands in for vLLM and writes down what it is asked for."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    seen = tmp_path / "seen"
    spec = SystemSpec(
        kind="vllm", model_dir=demo_dir, dtype="float32", num_shards=1, python=sys.executable,
        variables=(("PYTHONPATH", str(tmp_path)), ("SEEN", str(seen))),
    )  # fmt: skip
    system = ForeignSystem(spec, WORKLOAD)
    try:
        assert system.detail == f"vLLM fake PYTHONPATH={tmp_path.name} SEEN=seen"
        for name in ("chat", "logprobs"):
            assert system.generate(PROMPTS, 3, SAMPLINGS[name]) == [3, 3]
    finally:
        system.close()
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 0, 1]
    assert (lines[0]["temperature"], lines[0]["top_p"], lines[0]["top_k"]) == (0.7, 0.8, 20)
    assert (lines[0]["repetition_penalty"], lines[0]["logprobs"]) == (1.05, None)
    assert (lines[2]["temperature"], lines[2]["top_k"], lines[2]["logprobs"]) == (0.0, 0, 5)
    assert all(line["ignore_eos"] for line in lines)


class FakeLlama:
    """llama.cpp's interface as far as a chain needs it: each sampler is its name and arguments."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits
        self.accepted: list[int] = []
        self.chain: list[tuple[Any, ...]] = []

    def llama_sampler_chain_default_params(self) -> None:
        return None

    def llama_sampler_chain_init(self, params: None) -> list[tuple[Any, ...]]:
        self.chain = []
        return self.chain

    def llama_sampler_chain_add(self, chain: list[tuple[Any, ...]], part: tuple[Any, ...]) -> None:
        chain.append(part)

    def llama_sampler_accept(self, chain: object, token: int) -> None:
        self.accepted.append(token)

    def llama_get_logits_ith(self, context: object, place: int) -> Any:
        return self.logits[place].ctypes.data_as(np.ctypeslib.ctypes.POINTER(np.ctypeslib.ctypes.c_float))

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("llama_sampler_init_")
        return lambda *arguments: (name.removeprefix("llama_sampler_init_"), *arguments)


def chooser(api: FakeLlama, name: str) -> _Chooser:
    return _Chooser(api, None, 50, prompts=PROMPTS[:1], num_tokens=3, sampling=asdict(SAMPLINGS[name]))


def test_llama_cpp_penalizes_the_whole_sequence_and_then_narrows() -> None:
    """The order of the other systems; top_k may stand before the temperature, which changes no order."""
    api = FakeLlama(np.zeros((1, 50), np.float32))
    chooser(api, "chat")
    assert api.chain == [
        ("penalties", 50, 7, 1.05, 0.0, 0.0),
        ("top_k", 20),
        ("temp", 0.7),
        ("top_p", 0.8, 1),
        ("dist", 0),
    ]
    assert api.accepted == PROMPTS[0]
    chooser(api, "top-p")
    assert api.chain == [("temp", 1.0), ("top_p", 0.95, 1), ("dist", 0)]


def test_llama_cpp_gives_the_likeliest_tokens_log_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    one = chooser(FakeLlama(logits), "logprobs")
    found = sorted(one._likeliest(2, 5), key=lambda pair: -pair[1])
    values, ids = torch.from_numpy(logits[2]).log_softmax(dim=0).topk(5)
    assert [token for token, _ in found] == ids.tolist()
    assert all(math.isclose(a, b, rel_tol=1e-4) for (_, a), b in zip(found, values.tolist(), strict=True))
    assert one.choose(0, 2) == int(logits[2].argmax())


@pytest.mark.parametrize("kind", ["transformers", "local"])
def test_every_sampling_gives_every_prompt_its_tokens(demo_dir: Path, kind: Any) -> None:
    pytest.importorskip("transformers")
    spec = SystemSpec(kind=kind, model_dir=demo_dir, dtype="float32", num_shards=1)
    config = read_config(demo_dir)
    num_threads = torch.get_num_threads()
    system = build_system(spec, config, WORKLOAD)
    try:
        for sampling in SAMPLINGS.values():
            assert system.generate(PROMPTS, 3, sampling) == [3, 3], sampling.name
    finally:
        system.close()
        torch.set_num_threads(num_threads)
