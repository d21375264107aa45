"""`moe-cluster plan` from a config.json alone: parameters as on the models' cards, bytes as processes will hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.published import PUBLISHED
from cluster.cli import main

PUBLISHED_FILES = Path(__file__).parents[1] / "data" / "published"

# Billions, as model cards and the hub give them; of shared embeddings one copy counts.
CARDS = {
    "Qwen1.5-MoE-A2.7B": "14.3", "Qwen2-57B-A14B": "57.4",
    "Qwen1.5-0.5B": "0.46", "Qwen1.5-1.8B": "1.84", "Qwen1.5-4B": "3.95", "Qwen1.5-7B": "7.72", "Qwen1.5-14B": "14.2",
    "Qwen1.5-32B": "32.5", "Qwen1.5-72B": "72.3", "Qwen1.5-110B": "111",
    "Qwen2-0.5B": "0.49", "Qwen2-1.5B": "1.54", "Qwen2-7B": "7.62", "Qwen2-72B": "72.7",
    "Qwen2.5-0.5B": "0.49", "Qwen2.5-1.5B": "1.54", "Qwen2.5-3B": "3.09", "Qwen2.5-7B": "7.62",
    "Qwen2.5-14B": "14.8", "Qwen2.5-32B": "32.8", "Qwen2.5-72B": "72.7",
}  # fmt: skip


@pytest.fixture
def planned(tmp_path, capsys):
    """Plans a model of which only config.json is there: the JSON object."""

    def plan(raw, *arguments):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert main(["plan", str(tmp_path), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_released_model_has_its_published_number_of_parameters(planned, name):
    """Of its card, and to the last one as transformers counts them."""
    found = planned(PUBLISHED[name])["parameters"]
    card = CARDS[name]
    assert f"{found / 1e9:.{len(card.partition('.')[2])}f}" == card
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PUBLISHED[name]))
    assert found == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("Qwen1.5-MoE-A2.7B", "14.3 B parameters (14,315,784,192), 2.7 B of them active for a token"),
        ("Qwen1.5-MoE-A2.7B-Chat", "14.3 B parameters (14,315,784,192), 2.7 B of them active for a token"),
        ("Qwen2-57B-A14B", "57.4 B parameters (57,408,658,944), 14.2 B of them active for a token"),
        ("Qwen2-57B-A14B-Instruct", "57.4 B parameters (57,408,658,944), 14.2 B of them active for a token"),
    ],
)
def test_the_four_released_moe_models_are_planned_from_their_published_files(name, numbers, capsys):
    assert main(["plan", str(PUBLISHED_FILES / name)]) == 0
    assert numbers in " ".join(capsys.readouterr().out.split())


def test_a_dense_model_has_no_shards_and_no_active_part(planned, capsys, tmp_path):
    """Qwen2-0.5B, embeddings shared: 494,032,768 × 2 bytes; 2 × 24 layers × 2 heads × 64 × 2 bytes a token."""
    plan = planned(PUBLISHED["Qwen2-0.5B"])
    assert plan["parameters"] == plan["active_parameters"] == 494_032_768
    assert plan["attention_replica_bytes"] == 988_065_536
    assert plan["kv_bytes_per_token"] == 12_288
    assert plan["expert_shards"] == []
    assert plan["sliding_windows"] == []
    assert main(["plan", str(tmp_path)]) == 0
    assert "active" not in capsys.readouterr().out


def test_layers_whose_window_slides_are_told_apart(planned, capsys, tmp_path):
    """10 of 24 layers from max_window_layers on: 10 / 24 of 12,288 bytes."""
    changes = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14}
    plan = planned({**PUBLISHED["Qwen2-0.5B"], **changes})
    assert plan["kv_bytes_per_token"] == 12_288
    assert plan["sliding_windows"] == [{"tokens": 4096, "kv_bytes_per_token": 5120}]
    assert main(["plan", str(tmp_path)]) == 0
    assert "a token (5.12 KB of it for the last 4,096 tokens alone)" in " ".join(capsys.readouterr().out.split())


def test_a_dtype_scales_every_byte(planned):
    half, full = (planned(PUBLISHED["Qwen1.5-MoE-A2.7B"], "--dtype", dtype, "--shards", "7") for dtype in
                  ("float16", "float32"))  # fmt: skip
    assert [shard["experts"] for shard in half["expert_shards"]] == [216, 216, 216, 216, 192, 192, 192]
    assert full["attention_replica_bytes"] == 2 * half["attention_replica_bytes"]
    assert [s["bytes"] for s in full["expert_shards"]] == [2 * s["bytes"] for s in half["expert_shards"]]
    assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]


def test_a_cache_in_8_bits_is_counted_with_its_scales(planned, capsys, tmp_path):
    """2 x 24 layers x 16 heads: 128 numbers in 2 bytes each; in 8 bits 128 and 2 for their scale."""
    plain, eight = (
        planned(PUBLISHED["Qwen1.5-MoE-A2.7B"], "--kv-cache-dtype", name)["kv_bytes_per_token"]
        for name in ("auto", "int8")
    )
    assert (plain, eight) == (2 * 24 * 16 * 256, 2 * 24 * 16 * 130)
    assert main(["plan", str(tmp_path), "--kv-cache-dtype", "fp8"]) == 0
    assert "KV cache: 99.84 KB a token in fp8" in " ".join(capsys.readouterr().out.split())


def test_ranks_have_their_parts_of_the_weights_and_of_the_cache(planned, capsys, tmp_path):
    """Of 14 heads and 2 of keys and values 7 and 1 each; of 4,864 inner features 2,432; of 1,187 x 128 tokens 594 and
    593 x 128. A layer: 448 x 896 + 448, 2 x (64 x 896 + 64), 896 x 448, 3 x 2432 x 896, 2 x 896; 24 of them; a norm.
    """
    plan = planned(PUBLISHED["Qwen2-0.5B"], "--tensor-parallel-size", "2")
    layers = 24 * (448 * 896 + 448 + 2 * (64 * 896 + 64) + 896 * 448 + 3 * 2432 * 896 + 2 * 896) + 896
    assert [rank["bytes"] for rank in plan["ranks"]] == [2 * (layers + num * 128 * 896) for num in (594, 593)]
    assert [rank["kv_bytes_per_token"] for rank in plan["ranks"]] == [6144, 6144]
    assert planned(PUBLISHED["Qwen2-0.5B"])["ranks"] == []
    assert main(["plan", str(tmp_path), "--tensor-parallel-size", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "attention replica, rank 1 │ dense weights │ │ 494 MB" in out
    assert "12.29 KB a token, at most 6.144 KB of it in a rank, for each attention replica" in out
    assert main(["plan", str(tmp_path), "--tensor-parallel-size", "15"]) == 2
    assert "tensor_parallel_size is 15, and the model has 14 query heads" in capsys.readouterr().err


def test_weights_that_are_there_are_looked_at(tmp_path, capsys):
    """A missing part is named; without any weights the config is enough, and with those of another format it is not."""
    write_demo_checkpoint(tmp_path / "demo")
    (tmp_path / "demo" / "model-00002-of-00003.safetensors").unlink()
    assert main(["plan", str(tmp_path / "demo")]) == 2
    assert "model-00002-of-00003.safetensors" in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "demo" / "config.json", tmp_path / "alone")
    assert main(["plan", str(tmp_path / "alone")]) == 0
    (tmp_path / "alone" / "pytorch_model.bin").write_bytes(b"")
    assert main(["plan", str(tmp_path / "alone")]) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err


def test_a_context_that_is_given_is_checked_and_shown(planned, capsys, tmp_path):
    assert planned(PUBLISHED["Qwen2-0.5B"])["context_tokens"] == 131_072
    assert planned(PUBLISHED["Qwen2-0.5B"], "--max-model-len", "4096")["context_tokens"] == 4096
    assert main(["plan", str(tmp_path), "--max-model-len", "131073"]) == 2
    assert "max_model_len is 131073, the checkpoint's context has 131072 tokens" in capsys.readouterr().err


def test_a_missing_tokenizer_is_mentioned(tmp_path, capsys):
    """Token ids can be served without it, so it is no reason to refuse a plan."""
    write_demo_checkpoint(tmp_path / "demo")
    assert main(["plan", str(tmp_path / "demo")]) == 0
    assert "tokenizer" not in capsys.readouterr().out
    for path in (tmp_path / "demo").glob("tokenizer*"):
        path.unlink()
    assert main(["plan", str(tmp_path / "demo")]) == 0
    assert "no tokenizer (tokenizer.json, or vocab.json with" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", str(tmp_path / "demo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["has_tokenizer"] is False
