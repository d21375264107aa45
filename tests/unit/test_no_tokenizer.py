"""A checkpoint without a tokenizer: refused before anything loads, or served with token ids alone."""

import asyncio
import shutil
from pathlib import Path

import pytest
from serving_fakes import EchoBackend, make_service, says

from cluster import LLM, SamplingParams
from cluster.config import ClusterConfig
from cluster.errors import CheckpointError, InvalidRequest
from cluster.runtime.start.application import check_config
from cluster.serving.text.prompts import Prompt

ADVICE = r"tokenizer.json is missing, and vocab.json with merges.txt is not there .* with skip_tokenizer"


@pytest.fixture(params=["no file", "its config alone"])
def model_dir(demo_checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    for file in path.glob("tokenizer*.json"):
        if request.param == "no file" or file.name == "tokenizer.json":
            file.unlink()
    return path


def test_it_is_refused_in_one_line_that_says_what_to_do(model_dir: Path) -> None:
    for refused in (lambda: LLM(model_dir), lambda: check_config(ClusterConfig(model=str(model_dir)))):
        with pytest.raises(CheckpointError, match=ADVICE) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_offline_it_answers_token_ids(model_dir: Path, demo_checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    options = {"dtype": "float32", "kv_cache_bytes": 1 << 20}
    with LLM(demo_checkpoint, **options) as whole, LLM(model_dir, skip_tokenizer=True, **options) as llm:
        [output] = llm.generate([[1, 2, 3]], params)
        assert output.token_ids == whole.generate([[1, 2, 3]], params)[0].token_ids
        assert output.text == ""
        for call in (lambda: llm.generate("hi"), lambda: llm.chat([{"role": "user", "content": "hi"}])):
            with pytest.raises(InvalidRequest, match="needs the tokenizer, which skip_tokenizer left out"):
                call()


def test_served_it_answers_token_ids_and_refuses_texts_in_one_line(model_dir: Path) -> None:
    check_config(ClusterConfig(model=str(model_dir), skip_tokenizer=True))
    backend = EchoBackend()
    service = make_service(None, backend)
    token_ids, params = Prompt(token_ids=[5, 6]), SamplingParams(max_tokens=2)
    output = asyncio.run(service.generate(token_ids, params))
    assert (output.token_ids, output.text, output.finish_reason) == ((5, 6), "", "length")
    refused = {
        "text": lambda: service.generate(Prompt(text="hi"), params),
        "chat": lambda: service.generate(Prompt(chat=says("hi")), params),
        "stop": lambda: service.generate(token_ids, SamplingParams(stop=["."])),
        "token_ids": lambda: service.detokenize([5]),
    }
    refused_tokenize = {"text": lambda: service.tokenize(Prompt(text="a")), "chat": lambda: service.tokenize(says_hi())}
    for field, call in (*refused.items(), *refused_tokenize.items()):
        with pytest.raises(InvalidRequest, match=r"the tokenizer, which this server has left out \(skip_tok") as caught:
            asyncio.run(call())
        assert (caught.value.field, caught.value.grpc_code) == (field, "INVALID_ARGUMENT")
        assert "\n" not in str(caught.value)
    assert len(backend.requests) == 1


def says_hi() -> Prompt:
    return Prompt(chat=says("hi"))
