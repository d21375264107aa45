"""A model from its name: which files are asked for, from where, and what goes wrong. Against a hub on loopback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import DENSE, EXPERTS, FIRST, NAME, SECOND, SMALL, Hub
from safetensors.torch import load_file, save_file

from cluster.checkpoint.model_files import complete_directory, model_directory, open_files, pinned, served_name
from cluster.checkpoint.names import dense_shapes, expert_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.cli import main
from cluster.config import EngineConfig
from cluster.engine.preflight import check_checkpoint
from cluster.errors import CheckpointError
from cluster.llm import LLM
from cluster.metrics import ShardMetrics, new_registry
from cluster.runtime.workers.rehearsal import Rehearsal
from cluster.runtime.workers.shard_server import ShardServer

pytest_plugins = ["hub_fixtures"]


def load(model: str, names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    targets = {name: torch.zeros(shape) for name, shape in names.items()}
    open_checkpoint(model).load(targets)
    return targets


def test_checks_before_a_start_need_json_alone(hub: Hub) -> None:
    reader = check_checkpoint(pinned(NAME), EngineConfig(), 2)
    assert reader.config.num_experts == 64
    assert set(hub.fetched()) == SMALL
    assert hub.fetched(".safetensors") == []


def test_each_part_fetches_only_the_files_that_hold_its_tensors(hub: Hub, checkpoint: Path) -> None:
    reader = open_checkpoint(pinned(NAME))
    shard = [name for i in range(32) for name in expert_shapes(reader.config, 1, i)]
    assert reader.missing_bytes(shard) == (checkpoint / EXPERTS[0]).stat().st_size
    reported: list[int] = []
    reader.fetch(shard, reported.append)
    assert hub.fetched(".safetensors") == [EXPERTS[0]]
    assert sum(reported) == (checkpoint / EXPERTS[0]).stat().st_size
    assert reader.missing_bytes(shard) == 0
    reader.fetch(dense_shapes(reader.config))
    assert hub.fetched(".safetensors") == [DENSE, EXPERTS[0]]
    other = open_checkpoint(pinned(NAME))  # as another process of the node
    other.fetch(shard)
    other.fetch(dense_shapes(reader.config))
    assert hub.fetched(".safetensors") == [DENSE, EXPERTS[0]]


def test_tensors_are_those_of_the_files(hub: Hub, checkpoint: Path) -> None:
    wanted = expert_shapes(open_checkpoint(checkpoint).config, 1, 40)
    found = load(NAME, wanted)
    assert found.keys() == wanted.keys()
    stored = load_file(checkpoint / EXPERTS[1])
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in found.items())
    assert hub.fetched(".safetensors") == [EXPERTS[1]]


def test_a_name_means_one_commit_from_its_start_on(hub: Hub, checkpoint: Path) -> None:
    model = pinned(NAME)
    assert model == f"{NAME}@{FIRST}"
    hub.repositories[NAME].commit = SECOND
    assert pinned(model) == model
    assert pinned(NAME) == f"{NAME}@{SECOND}"
    assert pinned(f"{NAME}@main") == f"{NAME}@{SECOND}"
    assert served_name(model) == NAME
    assert pinned(checkpoint) == str(checkpoint)
    assert os.path.isdir(model_directory(f"{NAME}@{SECOND}"))
    assert model_directory(f"{NAME}@{SECOND}").name == SECOND


def test_a_small_checkpoint_in_one_file_is_checked_by_its_header_alone(hub: Hub, checkpoint: Path) -> None:
    """In one file without an index, as those of less than 5 GB: the shapes come from its first 100 KB."""
    files = hub.repositories[NAME].files
    del files["model.safetensors.index.json"]
    whole = checkpoint.parent / "whole.safetensors"
    save_file({k: v for name in (DENSE, *EXPERTS) for k, v in load_file(checkpoint / name).items()}, whole)
    for name in (DENSE, *EXPERTS):
        del files[name]
    files["model.safetensors"] = whole.read_bytes()
    check_checkpoint(pinned(NAME), EngineConfig(), 2)
    sent = [call.sent for call in hub.calls if call.method == "GET" and "/storage/" in call.path]
    assert 0 < sum(sent) < 400_000 < len(files["model.safetensors"])


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # it writes so much at a time
    hub.break_after, hub.breaks = 1_000_000, 2
    reported: list[int] = []
    reader = open_checkpoint(pinned(NAME))
    reader.fetch(expert_shapes(reader.config, 0, 0), reported.append)
    ranges = [call.headers.get("range") for call in hub.calls if call.method == "GET" and "/storage/" in call.path]
    assert ranges == [None, "bytes=1000000-", "bytes=2000000-"]
    assert sum(reported) == (checkpoint / EXPERTS[0]).stat().st_size
    assert (model_directory(pinned(NAME)) / EXPERTS[0]).read_bytes() == (checkpoint / EXPERTS[0]).read_bytes()


def test_what_was_fetched_once_is_there_offline(hub: Hub, offline: Callable[[], None]) -> None:
    reader = open_checkpoint(pinned(NAME))
    reader.fetch(expert_shapes(reader.config, 0, 0))
    offline()
    calls = len(hub.calls)
    model = pinned(NAME)
    assert model == f"{NAME}@{FIRST}"
    assert load(model, expert_shapes(reader.config, 0, 0))
    with pytest.raises(CheckpointError, match=f"{EXPERTS[1]} is not in the cache .* HF_HUB_OFFLINE forbids"):
        load(model, expert_shapes(reader.config, 0, 40))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        pinned(f"{NAME}@other")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        open_files("tiny/other")
    assert len(hub.calls) == calls


def test_an_llm_by_name_answers_as_one_from_the_directory(hub: Hub, checkpoint: Path) -> None:
    prompts, params = [[1, 2, 3, 4], "a question"], {"temperature": 0, "max_tokens": 6}
    with LLM(checkpoint, dtype="float32") as llm:
        expected = [output.token_ids for output in llm.generate(prompts, params)]
    with LLM(f"{NAME}@main", dtype="float32") as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.info.model_id == NAME
    assert hub.fetched(".safetensors") == [DENSE, *EXPERTS]


def test_plan_says_what_each_process_has_to_fetch(
    hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [(checkpoint / file).stat().st_size for file in (DENSE, *EXPERTS)]
    assert main(["plan", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download_bytes"] == sizes
    assert main(["plan", NAME, "--shards", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{sizes[0] / 1e6:.4g} MB by an attention replica, {sum(sizes[1:]) / 1e6:.4g} MB by expert shard 0" in shown
    assert main(["plan", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download_bytes"] == []
    assert hub.fetched(".safetensors") == []
    assert main(["plan", "tiny/nothing"]) == 2
    assert capsys.readouterr().err.startswith("moe-cluster: tiny/nothing: ")


def test_a_bench_takes_all_files_of_a_name(hub: Hub, checkpoint: Path) -> None:
    folder = complete_directory(NAME)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in checkpoint.iterdir()
    }
    assert complete_directory(checkpoint) == checkpoint


def test_a_shards_progress_counts_what_it_fetches_and_what_it_reads(hub: Hub, checkpoint: Path) -> None:
    """32 experts of 3 × 64 × 32 × 4 bytes in one layer, after the file that has them."""
    totals, counted = [], []
    server = ShardServer(0, ShardMetrics(new_registry(), 0), Rehearsal())

    def progress(total_bytes: int) -> Callable[[int], None]:
        totals.append(total_bytes)
        return counted.append

    server.load(pinned(NAME), {0: range(32)}, dtype="float32", device="cpu", progress=progress)
    of_file, of_experts = (checkpoint / EXPERTS[0]).stat().st_size, 32 * 3 * 64 * 32 * 4
    assert totals == [of_file + of_experts] == [sum(counted)]
    server.load(pinned(NAME), {0: range(31)}, dtype="float32", device="cpu", progress=progress)
    assert totals[1:] == [0]
    assert hub.fetched(".safetensors") == [EXPERTS[0]]


def test_a_file_that_the_cache_has_lost_is_fetched_again(hub: Hub, checkpoint: Path) -> None:
    """Its link is still there, into nowhere."""
    reader = open_checkpoint(pinned(NAME))
    wanted = expert_shapes(reader.config, 0, 0)
    reader.fetch(wanted)
    link = model_directory(pinned(NAME)) / EXPERTS[0]
    link.resolve().unlink()
    assert load(pinned(NAME), wanted)
    assert link.read_bytes() == (checkpoint / EXPERTS[0]).read_bytes()
    (reader.model_dir / "tokenizer.json").resolve().unlink()
    assert (model_directory(pinned(NAME)) / "tokenizer.json").exists()
