"""`moe-cluster eval --address` gives the number of the same model offline."""

import json

import pytest
import torch

from cluster import cli

pytestmark = pytest.mark.ray


def test_eval_through_a_server_gives_the_number_of_transformers(served, demo_checkpoint, tmp_path, capsys):
    """In windows that do not overlap, the guide's perplexity is the mean of the model's own losses by their tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "Which experts answered this question?\n" * 24
    (tmp_path / "text").write_text(text)
    arguments = ["--text", str(tmp_path / "text"), "--context", "64", "--stride", "64", "--json"]
    assert cli.main(["eval", "--address", f"127.0.0.1:{served.grpc_port}", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(demo_checkpoint)(text)["input_ids"]])
    losses, counts = [], []
    for window in torch.split(ids, 64, dim=1):
        with torch.inference_mode():
            losses.append(float(model(window, labels=window).loss))
        counts.append(window.shape[1] - 1)
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert len(counts) > 3
    assert found["num_tokens"] == ids.shape[1]
    assert found["perplexity"] == pytest.approx(float(torch.tensor(mean).exp()), rel=1e-5)
    assert cli.main(["eval", str(demo_checkpoint), "--device", "cpu", *arguments]) == 0
    offline = json.loads(capsys.readouterr().out)
    assert {key: pytest.approx(value, rel=1e-4) for key, value in offline.items()} == found


def test_a_context_beyond_the_servers_is_refused(served, tmp_path, capsys):
    (tmp_path / "ids").write_text("1 2 3")
    arguments = ["--token-ids", str(tmp_path / "ids"), "--context", "99999"]
    assert cli.main(["eval", "--address", f"127.0.0.1:{served.grpc_port}", *arguments]) == 2
    assert "context is 99999, the model's has 4096 tokens" in capsys.readouterr().err
