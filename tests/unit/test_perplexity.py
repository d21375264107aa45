"""`moe-cluster eval`: windows worked out by hand, and transformers' number, offline and through gRPC."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import config, dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster import cli
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.config.quantization import QUANTIZATIONS
from cluster.errors import SetupError
from cluster.kernels.rounding import dequantize, quantize
from cluster.perplexity import Windows, perplexity

IDS = [(7 * i * i + 3 * i) % 211 for i in range(90)]


def guide(model_dir: Path, ids: Sequence[int], context: int, stride: int) -> tuple[float, float]:
    """The guide's number with the model's own loss, and the one that counts each token once."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    weighed, weight, every = 0.0, 0, []
    before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([list(ids[begin:end])])
        labels = window.clone()
        labels[:, : before - end] = -100
        with torch.inference_mode():
            output = model(window, labels=labels)
        count = int((labels != -100).sum()) - 1
        weighed, weight = weighed + float(output.loss) * count, weight + count
        logprobs = output.logits[0, :-1].log_softmax(-1).gather(1, window[0, 1:, None])[:, 0]
        every += logprobs[-(end - before) :].tolist()
        before = end
        if end == len(ids):
            break
    return math.exp(weighed / weight), math.exp(-sum(every) / len(every))


def test_windows_slide_as_in_the_guide() -> None:
    """10 tokens, windows of 4: the second one begins at 2 and has two new ones."""
    assert list(Windows(context=4, stride=2).over(10)) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert list(Windows(context=4, stride=4).over(10)) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert list(Windows(context=4, stride=3).over(5)) == [(0, 4, 4), (3, 5, 1)]
    assert list(Windows(context=20, stride=5).over(10)) == [(0, 10, 10)]


@pytest.mark.parametrize(("batch", "calls"), [(1, 3), (2, 2), (8, 1)])
def test_each_token_counts_once_and_the_guides_weights_are_kept(batch: int, calls: int) -> None:
    """Token t has log-probability -t. Windows 0-4, 2-6, 4-7: new tokens' means 2 (of 1 2 3), 4.5 (4 5), 6 (6).

    By token: (1 + 2 + 3 + 4 + 5 + 6) / 6 = 3.5; the guide: (2 * 3 + 4.5 * 1 + 6 * 0) / 4 = 2.625.
    """
    asked, seen = [], []

    def score(parts: Sequence[Sequence[int]]) -> list[Any]:
        asked.append(len(parts))
        return [np.array([-float(token) for token in part[1:]], dtype=np.float32) for part in parts]

    result = perplexity(
        range(7), Windows(context=4, stride=2), score, batch=batch, progress=lambda *counts: seen.append(counts)
    )
    assert result.token_perplexity == pytest.approx(math.exp(3.5))
    assert result.perplexity == pytest.approx(math.exp(2.625))
    assert (len(asked), sum(asked), result.num_windows) == (calls, 3, 3)
    assert seen == [(4, 7), (6, 7), (7, 7)]


def test_a_last_window_of_one_token_weighs_nothing() -> None:
    result = perplexity(range(5), Windows(context=4, stride=4), lambda parts: [-np.ones(len(p) - 1) for p in parts])
    assert (result.perplexity, result.token_perplexity) == (pytest.approx(math.e), pytest.approx(math.e))


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None, 32768), (2048, 512)), ((None, None, 256), (256, 256)), ((1024, None, 4096), (1024, 512))],
)
def test_defaults_follow_from_the_models_context(given: Any, expected: tuple[int, int]) -> None:
    windows = Windows.of(*given)
    assert (windows.context, windows.stride) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((1, None, 100), "context is 1, at least 2"),
        ((101, None, 100), "context is 101, the model's has 100 tokens"),
        ((50, 51, 100), r"stride is 51, from 2 to context \(50\)"),
        ((50, 1, 100), "stride is 1, from 2"),
    ],
)
def test_windows_that_do_not_fit_are_refused(given: Any, named: str) -> None:
    with pytest.raises(SetupError, match=named):
        Windows.of(*given)


RAW = {
    "qwen2_moe": config(num_experts=6, num_experts_per_tok=2, num_hidden_layers=2, initializer_range=0.1),
    "qwen2, tied": dense(num_hidden_layers=2, tie_word_embeddings=True, initializer_range=0.1),
}


@pytest.mark.parametrize("family", list(RAW))
@pytest.mark.parametrize(("context", "stride"), [(32, 16), (32, 32), (256, 256), (30, 7)])
def test_eval_prints_transformers_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, context: int, stride: int
) -> None:
    write_checkpoint(tmp_path / "model", RAW[family], seed=1)
    (tmp_path / "ids").write_text(json.dumps(IDS))
    arguments = ["eval", str(tmp_path / "model"), "--token-ids", str(tmp_path / "ids"), "--device", "cpu", "--json"]
    assert cli.main([*arguments, "--context", str(context), "--stride", str(stride)]) == 0
    found = json.loads(capsys.readouterr().out)
    by_guide, by_token = guide(tmp_path / "model", IDS, context, stride)
    assert found["perplexity"] == pytest.approx(by_guide, abs=1e-3)
    assert found["token_perplexity"] == pytest.approx(by_token, abs=1e-3)
    assert (found["num_tokens"], found["context"], found["stride"]) == (90, context, stride)


def test_a_text_is_read_with_the_checkpoints_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    write_demo_checkpoint(tmp_path / "model", model_type="qwen2")
    (tmp_path / "text").write_text("The experts answered.\n\nAll of them, twice.\n" * 5)
    arguments = ["eval", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--context", "40"]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")((tmp_path / "text").read_text())["input_ids"]
    expected, _ = guide(tmp_path / "model", ids, 40, 40)
    found = re.fullmatch(
        r"perplexity ([\d.]+) \(([\d.]+) with each token once\): (\d+) tokens in (\d+) windows of 40, stride 40\n",
        capsys.readouterr().out,
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(expected, abs=1e-3)
    assert (int(found[3]), int(found[4])) == (len(ids), -(-len(ids) // 40))


def test_the_difference_that_rounding_makes_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By transformers too, the rounded weights written out as a checkpoint of their own."""
    write_checkpoint(tmp_path / "model", RAW["qwen2, tied"], seed=1)
    rounded = QUANTIZATIONS["int4-32"]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            layout = rounded.layout(tensor.shape[1])
            tensors[name] = dequantize(quantize(tensor, layout), layout).to(tensor.dtype)
    (tmp_path / "rounded").mkdir()
    save_file(tensors, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rounded" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    (tmp_path / "ids").write_text(json.dumps(IDS))
    before, after = (guide(tmp_path / name, IDS, 32, 16)[0] for name in ("model", "rounded"))
    arguments = ["eval", str(tmp_path / "model"), "--token-ids", str(tmp_path / "ids"), "--context", "32"]
    arguments += ["--stride", "16", "--device", "cpu", "--dtype", "float32", "--quantization", "int4-32", "--compare"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unquantized"]["perplexity"] == pytest.approx(before, rel=1e-4)
    assert found["perplexity"] == pytest.approx(after, rel=1e-3)
    assert found["difference"] == found["perplexity"] - found["unquantized"]["perplexity"]
    assert cli.main(arguments) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"unquantized: perplexity {found['unquantized']['perplexity']:.4f}")
    assert second.startswith(f"perplexity {found['perplexity']:.4f}")
    assert third.startswith(f"difference {found['difference']:+.4f} (")


def test_a_model_without_next_tokens_is_refused_before_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("it was loaded")

    write_checkpoint(
        tmp_path / "model", dense(architectures=["Qwen2ForTokenClassification"], num_hidden_layers=1), seed=1
    )
    (tmp_path / "ids").write_text("1 2 3")
    monkeypatch.setattr(CheckpointReader, "load", unwanted)
    assert cli.main(["eval", str(tmp_path / "model"), "--token-ids", str(tmp_path / "ids")]) == 1
    assert "it answers ClassifyTokens and Embed, not Score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{model}", "--text", "{empty}"], "is empty: there is nothing to measure"),
        (["{model}", "--text", "{latin}"], "is not valid UTF-8 at byte 1"),
        (["{model}", "--text", "{none}"], "cannot be read: No such file or directory"),
        (["{model}", "--token-ids", "{one}"], "the text has 1 tokens: at least 2 are needed"),
        (["{model}", "--token-ids", "{empty}"], "the text has 0 tokens"),
        (["{model}", "--token-ids", "{words}"], "'two' is no token id"),
        (["{model}", "--token-ids", "{large}"], "the vocabulary ends at 1023"),
        (["{model}", "--token-ids", "{one}", "--context", "99999"], "context is 99999, the model's has 4096"),
        (["{model}", "--token-ids", "{one}", "--address", "localhost:1"], "one of the two"),
        (["--token-ids", "{one}"], "one of the two"),
        (["--token-ids", "{one}", "--address", "localhost:1", "--dtype", "float32"], "--dtype is of an offline model"),
        (["{none}", "--token-ids", "{one}"], "none"),
        (["{model}", "--token-ids", "{one}", "--compare"], "--compare is of rounded numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    write_demo_checkpoint(tmp_path / "model", model_type="qwen2")
    files = {"empty": b" \n", "latin": b"h\xe4", "one": b"[5]", "words": b"1, two", "large": b"1 2 99999"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: str(tmp_path / name) for name in (*files, "model", "none")}
    assert cli.main(["eval", *(argument.format(**paths) for argument in arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
