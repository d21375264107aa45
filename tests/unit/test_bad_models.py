"""Models that are not served are refused in one line by `plan`, `serve` and `LLM`, before anything loads or starts."""

import json

import pytest
from bad_models import BAD_MODELS, WAYS
from configs import BASE

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.cli import main
from cluster.errors import InvalidRequest, SetupError


@pytest.fixture
def nothing_loads(monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(CheckpointReader, "load", unwanted)
    monkeypatch.setattr("cluster.runtime.start.served.start_ray", unwanted)


@pytest.fixture
def make(demo_checkpoint, tmp_path):
    """A copy of the demo checkpoint that is bad in one way."""

    def make(bad):
        for path in demo_checkpoint.iterdir():
            is_weights = ".safetensors" in path.name
            if path.name not in ("config.json", bad.without) and not (is_weights and bad.in_place_of_weights):
                (tmp_path / path.name).symlink_to(path)
        if bad.in_place_of_weights:
            (tmp_path / bad.in_place_of_weights).write_text("{}")
        if bad.without != "config.json":
            raw = json.loads((demo_checkpoint / "config.json").read_text()) | bad.config
            (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return make


def refusal(way, model_dir, options, capsys):
    """The one line that a user reads."""
    if way == "LLM":
        with pytest.raises(SetupError) as caught:
            LLM(model_dir, device="cpu", **options)
        return str(caught.value)
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"] if way == "serve" else []
    assert main([way, str(model_dir), *ports, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-cluster: ")
    return error.removesuffix("\n")


@pytest.mark.parametrize(
    ("bad", "way"), [pytest.param(bad, way, id=f"{bad.name}, {way}") for bad in BAD_MODELS for way in WAYS]
)
def test_it_is_refused_in_one_line(bad, way, make, nothing_loads, capsys):
    line = refusal(way, make(bad), bad.options, capsys)
    assert bad.message in line
    assert "\n" not in line


def test_a_text_for_a_model_loaded_without_its_tokenizer_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", BASE, seed=1)
    with LLM(tmp_path / "model", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20) as llm:
        with pytest.raises(InvalidRequest, match="text needs the tokenizer, which skip_tokenizer left out"):
            llm.generate("text", SamplingParams(max_tokens=1))
        with pytest.raises(InvalidRequest, match="256"):
            llm.generate([list(range(1, 200)) * 2], SamplingParams(max_tokens=1))
        with pytest.raises(InvalidRequest, match="it answers Generate, Score and Embed, not Classify"):
            llm.classify([[1, 2]])
