"""The benchmark's checkpoint, its child process, its command."""

import argparse
import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import LLM, CompletionOutput
from cluster.bench import add_arguments
from cluster.bench import checkpoint as bench_checkpoint
from cluster.bench.checkpoint import default_directory, made_checkpoint, read_config
from cluster.bench.cluster_system import ClusterSystem
from cluster.bench.command import PARTS, run
from cluster.bench.limits import check_arguments
from cluster.bench.sampling import Sampling
from cluster.bench.session import measure_all
from cluster.bench.spec import SystemSpec, kv_cache_bytes, step_tokens
from cluster.bench.throughput import (
    Point,
    Prompts,
    Spread,
    System,
    Workload,
)
from cluster.bench.worker import RemoteSystem, SystemResult, run_system
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.published import PUBLISHED
from cluster.config import ModelConfig
from cluster.errors import CheckpointError, ClusterError, SetupError

WORKLOAD = Workload(batches=(1, 4), prompt_tokens=8, output_tokens=5, repeats=3, vocab_size=100)

# The checkpoint


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_checkpoint("demo", 0, tmp_path_factory.mktemp("made"), lambda made, total: None)


def test_a_made_checkpoint_is_complete_and_used_again(demo_dir: Path) -> None:
    assert read_config(demo_dir).num_experts == 64
    before = {path: path.stat().st_mtime_ns for path in demo_dir.iterdir()}
    assert made_checkpoint("demo", 0, demo_dir.parent, lambda made, total: None) == demo_dir
    assert {path: path.stat().st_mtime_ns for path in demo_dir.iterdir()} == before
    assert list(demo_dir.parent.iterdir()) == [demo_dir]


def test_an_interrupted_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model_dir: Path, raw_config: object, **options: object) -> None:
        model_dir.mkdir()
        (model_dir / "model-00001-of-00002.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_checkpoint, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made_checkpoint("a2.7b", 4, tmp_path, lambda made, total: None)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_other_depth_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(model_dir: Path, raw_config: dict[str, int], **options: object) -> None:
        model_dir.mkdir()
        written.append(raw_config["num_hidden_layers"])

    monkeypatch.setattr(bench_checkpoint, "write_checkpoint", write)
    monkeypatch.setattr(bench_checkpoint, "write_tokenizer", lambda *arguments: None)
    paths = {made_checkpoint("a2.7b", n, tmp_path, lambda made, total: None) for n in (2, 4, 2)}
    assert written == [2, 4]
    assert len(paths) == 2
    with pytest.raises(SetupError, match="--layers is 0"):
        made_checkpoint("a2.7b", 0, tmp_path, lambda made, total: None)


@pytest.mark.parametrize("name", ["Qwen2-0.5B", "Qwen1.5-72B", "Qwen2.5-32B"])
def test_a_dense_checkpoint_is_made_with_all_layers_unless_fewer_are_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, object]] = []

    def write(model_dir: Path, raw_config: dict[str, object], **options: object) -> None:
        model_dir.mkdir()
        written.append(raw_config)

    monkeypatch.setattr(bench_checkpoint, "write_checkpoint", write)
    monkeypatch.setattr(bench_checkpoint, "write_tokenizer", lambda *arguments: None)
    for num_layers in (None, 2):
        made_checkpoint(name.lower(), num_layers, tmp_path, lambda made, total: None)
    assert written == [PUBLISHED[name], PUBLISHED[name] | {"num_hidden_layers": 2}]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="--checkpoint-dir"):
        made_checkpoint("demo", 0, tmp_path / "file", lambda made, total: None)


def test_made_checkpoints_are_kept_in_the_users_cache() -> None:
    assert default_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/moe-cluster/checkpoints")
    assert default_directory({}) == Path.home() / ".cache/moe-cluster/checkpoints"


def test_the_kv_cache_holds_the_largest_batch(demo_dir: Path) -> None:
    """40 + 30 tokens are two blocks of 64 and one to spare: 192 tokens for each of 32 sequences."""
    config = read_config(demo_dir)
    workload = Workload(batches=(1, 32), prompt_tokens=40, output_tokens=30, repeats=1, vocab_size=100)
    assert kv_cache_bytes(config, "float32", workload) == 32 * 192 * config.kv_bytes_per_token("float32")
    assert step_tokens(workload) == 2048
    assert step_tokens(dataclasses.replace(workload, prompt_tokens=100)) == 3200
    assert step_tokens(dataclasses.replace(workload, prompt_tokens=1000)) == 8192


# The child process

SPEC = SystemSpec(kind="local", model_dir=Path("unused"), dtype="float32", num_shards=1)


def rushing_clock() -> Callable[[], float]:
    """Each moment is further from the one before: a run takes longer than all before it, on however busy a machine."""
    moments = itertools.count()
    return lambda: float(next(moments) ** 2)


class InstantSystem:
    detail = "instant"

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling) -> list[int]:
        print("noise that must not reach stdout", flush=True)  # noqa: T201
        return [num_tokens] * len(prompts)

    def close(self) -> None:
        pass


def build_instant(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    return InstantSystem()


def build_killed(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def build_refused(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    raise CheckpointError("no such weights")


def build_broken(spec: SystemSpec, config: ModelConfig, workload: Workload) -> System:
    raise ZeroDivisionError("by nought")


def test_a_child_process_measures_and_reports(demo_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    workload = Workload(batches=(1, 2), prompt_tokens=4, output_tokens=20, repeats=1, vocab_size=10)
    found = run_system(SPEC, read_config(demo_dir), workload, lines.append, build_instant, clock=rushing_clock())
    assert (found.name, found.detail) == ("local", "instant")
    assert [point.batch for point in found.points] == [1, 2]
    assert all(point.decode.low > 0 for point in found.points)
    assert lines == ["loaded", *["batch 1, greedy"] * 2, *["batch 2, greedy"] * 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise" in err


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_killed, "local: its process ended with code -9 .* too little memory"),
        pytest.param(build_refused, "local: no such weights", marks=pytest.mark.slow),
        pytest.param(build_broken, "local: ZeroDivisionError: by nought", marks=pytest.mark.slow),
    ],
)
def test_a_child_that_fails_says_why(
    demo_dir: Path, build: Callable[[SystemSpec, ModelConfig, Workload], System], message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        run_system(SPEC, read_config(demo_dir), WORKLOAD, lambda line: None, build)


# The command


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["throughput", *arguments])


class FakeRun:
    """Stands in for the child processes; the systems in `failing` fail."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.specs: list[SystemSpec] = []

    def __call__(
        self, spec: SystemSpec, config: ModelConfig, workload: Workload, on_progress: Callable[[str], None]
    ) -> SystemResult:
        self.specs.append(spec)
        on_progress("loaded")
        if spec.name in self.failing:
            raise ClusterError(f"{spec.name}: too big")
        one = Spread(1.0, 1.0, 1.0)
        points = tuple(Point(batch=batch, prefill=one, decode=one) for batch in workload.batches)
        return SystemResult(name=spec.name, detail="fake", load_s=0.0, points=points)


def test_the_command_measures_the_reference_first_and_prints_the_report(
    demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one, file = FakeRun(), tmp_path / "result.json"
    args = parse(str(demo_dir), "--compare", "transformers", "--shards", "3", "--json", str(file))
    assert measure_all(args, run_one) == 0
    assert [spec.name for spec in run_one.specs] == ["transformers", "local", "stream, 3 shards", "ray, 3 shards"]
    assert {spec.dtype for spec in run_one.specs} == {read_config(demo_dir).dtype}
    out = capsys.readouterr().out
    assert out.startswith("Machine: ")
    assert "ratio to transformers" in out
    assert str(demo_dir) not in out
    assert json.loads(file.read_text())["reference"] == "transformers"


@pytest.mark.parametrize("transports", ["local,stream,ray", "stream"])
def test_a_dense_model_is_measured_in_one_process(tmp_path: Path, transports: str) -> None:
    write_demo_checkpoint(tmp_path / "dense", model_type="qwen2")
    run_one = FakeRun()
    assert measure_all(parse(str(tmp_path / "dense"), "--shards", "9", "--transports", transports), run_one) == 0
    assert [spec.name for spec in run_one.specs] == ["local"]


def test_ways_to_guess_tokens_ahead_are_systems_of_their_own(demo_dir: Path) -> None:
    run_one, ngram = FakeRun(), '{"method": "ngram"}'
    args = parse(
        str(demo_dir), "--transports", "local", "--speculative-config", "none", "--speculative-config", ngram
    )  # fmt: skip
    assert measure_all(args, run_one) == 0
    assert [spec.name for spec in run_one.specs] == ["local", "local, ngram"]
    assert [spec.speculative_config for spec in run_one.specs] == [None, {"method": "ngram"}]


def test_numbers_of_adapters_are_systems_of_their_own_beside_the_base(demo_dir: Path) -> None:
    run_one = FakeRun()
    args = parse(str(demo_dir), "--transports", "local", "--adapters", "0,1,4", "--compare", "transformers")
    assert measure_all(args, run_one) == 0
    assert [spec.name for spec in run_one.specs] == ["transformers", "local", "local, 1 adapter", "local, 4 adapters"]
    with pytest.raises(SetupError, match="--adapters has -1, numbers from 0 are needed"):
        check_arguments(parse("--adapters=-1,2"))


def test_a_batch_with_more_adapters_than_one_is_computed(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all linear layers but the routed experts'; the prompts have them in turns."""
    spec = dataclasses.replace(SPEC, model_dir=demo_dir, num_adapters=2)
    system = ClusterSystem(spec, read_config(demo_dir), WORKLOAD, num_threads=1)
    try:
        llm = system._llm
        assert llm.adapters == ("adapter-0", "adapter-1")
        seen: list[list[str]] = []

        def generate(prompts: Prompts, params: object, *, adapter: list[str]) -> list[CompletionOutput]:
            seen.append(adapter)
            return LLM.generate(llm, prompts, params, adapter=adapter)

        monkeypatch.setattr(llm, "generate", generate)
        assert system.generate([[1, 2], [3], [4]], 3) == [3, 3, 3]
        assert seen == [["adapter-0", "adapter-1", "adapter-0"]]
        assert len(llm.engine.adapters.find("adapter-0").layers[0]) == 4  # query to value, output, gate and up, down
    finally:
        system.close()


def test_a_draft_model_may_be_made(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_checkpoint, "write_checkpoint", lambda path, raw, **options: path.mkdir())
    monkeypatch.setattr(bench_checkpoint, "write_tokenizer", lambda *arguments: None)
    run_one, asked = FakeRun(), '{"method": "draft_model", "model": "qwen1.5-0.5b", "num_speculative_tokens": 3}'
    args = parse(
        str(demo_dir), "--transports", "local", "--speculative-config", asked, "--checkpoint-dir", str(tmp_path)
    )  # fmt: skip
    assert measure_all(args, run_one) == 0
    [spec] = run_one.specs
    assert spec.speculative_config is not None
    assert Path(spec.speculative_config["model"]).parent == tmp_path
    assert spec.name.startswith("local, draft_model qwen1.5-0.5b-24-layers-")
    assert spec.name.endswith(", num_speculative_tokens 3")


def test_a_system_that_fails_leaves_the_others_figures(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_all(parse(str(demo_dir), "--batch", "2"), FakeRun("ray, 2 shards")) == 1
    out = capsys.readouterr().out
    assert "| 2     | local " in out
    assert "- FAILED: ray, 2 shards: too big" in out


def test_the_command_lets_systems_take_turns(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(spec: SystemSpec, config: ModelConfig, workload: Workload) -> RemoteSystem:
        if spec.kind == "ray":
            raise ClusterError("too big")
        return RemoteSystem(spec, config, workload, build_instant)

    args = parse(str(demo_dir), "--batch", "2", "--repeat", "1", "--turns", "--output-tokens", "20")
    assert measure_all(args, start_one=start, clock=rushing_clock()) == 1
    out = capsys.readouterr().out
    assert "| 2     | local " in out
    assert "| 2     | stream, 2 shards " in out
    assert "- FAILED: ray, 2 shards: too big" in out


def test_the_command_makes_the_checkpoint_that_it_measures(tmp_path: Path) -> None:
    run_one = FakeRun()
    args = parse("--shapes", "demo", "--checkpoint-dir", str(tmp_path), "--dtype", "float16")
    assert measure_all(args, run_one) == 0
    assert run_one.specs[0].model_dir == tmp_path / "demo"
    assert run_one.specs[0].dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "0"], "--shards is 0, 1 to 64"),
        (["--shards", "65"], "--shards is 65, 1 to 64"),
        (["--prompt-tokens", "100000000"], "the checkpoint's context is"),
        (["--output-tokens", "1"], "--output-tokens is 1"),
    ],
)
def test_arguments_that_cannot_be_carried_out_are_refused_before_anything_runs(
    demo_dir: Path, arguments: list[str], message: str
) -> None:
    run_one = FakeRun()
    with pytest.raises(SetupError, match=message):
        measure_all(parse(str(demo_dir), *arguments), run_one)
    assert run_one.specs == []


@pytest.mark.parametrize(
    ("part", "option"), [*((part, "--json") for part in PARTS if part != "calibrate"), ("calibrate", "--output")]
)
def test_a_result_that_could_not_be_written_is_refused_first(part: str, option: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SetupError, match=f"{option} .* does not exist"):
        run(parser.parse_args([part, option, "/no/such/directory/file"]))


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        measure_all(parse(str(tmp_path)), FakeRun())


def test_arguments_are_parsed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("--batch", "32,1,8,8", "--transports", "ray")
    assert args.batch == (1, 8, 32)
    assert args.transports == ("ray",)
    for wrong in (["--batch", "1,x"], ["--speculative-config", '{"method": "x"}'], ["--transports", "pigeon"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
    assert "known are local, stream, ray" in capsys.readouterr().err
