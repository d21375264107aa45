"""Arguments that no command can use: each is refused in one line that names it, with exit code 2, before any work."""

import json
from concurrent.futures.process import BrokenProcessPool

import pytest

from cluster.cli import main

DEAD = "127.0.0.1:1"
NINES = "9" * 5000  # Python reads no number of over 4,300 digits
DEEP = "[" * 5000  # deeper than Python's own stack


def refused(capsys, *arguments):
    """Returns the one line."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-cluster: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("port", [NINES, "²", "٣", "65536", "-1", ""])
def test_a_port_that_cannot_be_is_refused(port, capsys):
    address = f"127.0.0.1:{port}"
    assert "is no address of a Ray" in refused(capsys, "status", "--ray-address", address)
    assert "HOST:PORT is needed" in refused(capsys, "chat", "--address", address)
    if port != "65536":  # refused later, as any port that cannot be bound
        assert "is no port: 8000" in refused(capsys, "demo", f"--http-port={port}")


@pytest.mark.parametrize(("one", "other"), [("grpc", "http"), ("grpc", "metrics"), ("http", "metrics")])
def test_one_port_for_two_purposes_is_refused(one, other, capsys):
    ports = {"grpc": 0, "http": 0, "metrics": 0, one: 29000, other: 29000}
    error = refused(capsys, "serve", "demo", *(f"--{name}-port={port}" for name, port in ports.items()))
    assert f"{one} port and {other} port are both 29000" in error


@pytest.mark.parametrize("shards", ["--expert-shards", "--attention-replicas"])
def test_no_process_and_too_many_are_no_scale(shards, capsys):
    """Before a cluster is looked for, and before the other half of the change."""
    for count in ("0", "-1", "4097"):
        error = refused(capsys, "scale", f"{shards}={count}", "--ray-address", DEAD)
        assert f"{shards} is {count}, 1 to 4096 is needed" in error


def test_deep_json_is_refused(capsys):
    assert "is no JSON" in refused(capsys, "plan", "demo", "--rope-scaling", DEEP)


def test_a_model_without_a_name_is_refused(capsys):
    """As an unset variable of a shell gives it: the current directory is not meant."""
    assert "the model's name is empty" in refused(capsys, "plan", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"messages": [], "params": [1]}, "has no object of parameters"),
        ({"messages": [], "params": {"bogus": 1}}, "'bogus' is no parameter"),
        ({"messages": [], "params": {"temperature": "warm"}}, "temperature"),
        ({"messages": [], "tools": 5}, "has no list of tools"),
        ({"messages": [], "tools": [5]}, "has no list of tools"),
        ({"messages": 5}, "has no list of messages"),
        ({"messages": [5]}, "message 0 is 5"),
    ],
)
def test_a_chat_that_cannot_go_on_is_refused(content, words, capsys, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(content))
    error = refused(capsys, "chat", "--address", DEAD, "--load", str(file))
    assert error.startswith(f"moe-cluster: --load: {file}")
    assert words in error


def test_a_chat_that_cannot_be_read_is_wrong_usage(capsys, tmp_path):
    for path, words in (("/nonexistent", "No such file"), (str(tmp_path), "Is a directory"), ("/dev/null", "no JSON")):
        error = refused(capsys, "chat", "--address", DEAD, "--load", path)
        assert error.startswith(f"moe-cluster: --load: {path} ")
        assert words in error


@pytest.mark.parametrize("option", ["--api-key-file=/x", "--tls", "--tls-ca=/x", "--tls-cert=/x", "--tls-key=/x"])
def test_an_offline_model_has_no_use_for_a_servers_options(option, capsys):
    error = refused(capsys, "eval", "demo", "--text", "/nonexistent", option)
    assert f"{option.partition('=')[0]} is of a running server" in error


# bench


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing may begin to measure, to write a checkpoint or to start a Ray."""

    def begun(*args, **kwargs):
        raise AssertionError("it measures")

    for place in (
        "bench.worker.RemoteSystem.__init__", "bench.context.ProcessPoolExecutor", "bench.kernels.session._measure",
        "bench.checkpoint.write_checkpoint", "runtime.start.echo.start_ray",
    ):  # fmt: skip
        monkeypatch.setattr(f"cluster.{place}", begun)


HUGE = str(10**25)


@pytest.mark.parametrize(
    ("part", "option"),
    [
        *(("throughput", name) for name in ("batch", "repeat", "layers", "shards", "prompt-tokens", "output-tokens")),
        *(("kernels", name) for name in ("batch", "context", "threads", "repeat")),
        *(("transport", name) for name in ("shards", "rows", "hidden-size", "repeat")),
        *(("growth", name) for name in ("batch", "context", "shards", "repeat", "layers")),
        *(("context", name) for name in ("context", "chunk", "window")),
        *(("gpu", name) for name in ("batch", "layers", "prompt-tokens")),
        *(("serve", name) for name in ("requests", "concurrency", "prompt-tokens", "output-tokens")),
    ],
)
def test_a_bench_without_an_end_is_refused(part, option, capsys, unmeasured):
    error = refused(capsys, "bench", part, f"--{option}", HUGE)
    assert f"--{option} has {HUGE}, at most " in error


@pytest.mark.parametrize("rate", ["nan", "inf", "-inf", "0", "1e-300", "1e300"])
def test_a_rate_that_no_clock_keeps_is_refused(rate, capsys):
    assert "--rate is " in refused(capsys, "bench", "serve", "--address", DEAD, f"--rate={rate}")


def test_traffic_whose_prompts_find_no_room_is_refused(capsys):
    error = refused(capsys, "bench", "serve", "--address", DEAD, "--requests", "1000000", "--prompt-tokens", "1000")
    assert "--requests and --prompt-tokens make 1000000000 tokens, " in error


def test_rows_that_find_no_room_are_refused(capsys, unmeasured):
    error = refused(capsys, "bench", "transport", "--rows", "1000000", "--hidden-size", "1000000")
    assert "--rows and --hidden-size make 2000000000000 bytes, " in error


@pytest.mark.parametrize("part", ["throughput", "latency", "kernels", "transport", "growth", "context", "serve"])
def test_a_result_that_cannot_be_written_is_refused_before_the_bench(part, capsys, tmp_path, unmeasured):
    (tmp_path / "file").write_text("")
    for path, words in (
        ("", "is a directory"), (str(tmp_path), "is a directory"), (f"{tmp_path}/none/x", "does not exist"),
        (f"{tmp_path}/file/x", "does not exist"), ("x" * 5000, "too long"),
    ):  # fmt: skip
        assert words in refused(capsys, "bench", part, f"--json={path}")


@pytest.mark.parametrize("part", ["throughput", "growth"])
def test_a_picture_of_no_known_kind_is_refused_before_the_bench(part, capsys, tmp_path, unmeasured):
    for path in ("", "picture", "picture.xyz", str(tmp_path), ".png"):
        assert "--plot " in refused(capsys, "bench", part, f"--plot={path}")


@pytest.mark.parametrize(("engine", "option"), [("vllm", "--vllm-python"), ("llama.cpp", "--llama-python")])
def test_a_python_that_cannot_run_is_refused(engine, option, capsys, tmp_path, unmeasured):
    for path in ("/none", str(tmp_path), "/dev/zero", "/dev/null"):
        error = refused(capsys, "bench", "throughput", "--compare", engine, option, path)
        assert f"{option} {path} cannot be run (" in error
    assert "it cannot import" in refused(capsys, "bench", "throughput", "--compare", engine, option, "/bin/false")


def test_a_depth_that_nothing_takes_is_refused(capsys, unmeasured):
    for part in ("throughput", "growth"):
        error = refused(capsys, "bench", part, "--shapes", "demo", "--layers", "2")
        assert "--layers is not of the demo's checkpoint" in error
    assert "--layers is of a made checkpoint" in refused(capsys, "bench", "throughput", "/none", "--layers", "2")


def test_growth_past_the_checkpoint_is_refused_before_the_first_point(capsys, tmp_path, unmeasured):
    """The demo's context is 4,096 tokens, and its layers have 64 experts."""
    command = ["bench", "growth", "--shapes", "demo", "--checkpoint-dir", str(tmp_path)]
    assert "--shards is 65, 1 to 64" in refused(capsys, *command, "--shards", "1,65")
    error = refused(capsys, *command, "--context", "64,4090")
    assert "--context makes 4107 tokens with the answer's 17, the checkpoint's context is 4096" in error


def test_a_bench_that_finds_too_little_memory_ends_in_one_line(capsys, monkeypatch):
    """As torch words it where the kernel refuses; else the kernel ends the process."""

    def refuse(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    def die(*args, **kwargs):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr("cluster.bench.kernels.session._measure", refuse)
    error = refused(capsys, "bench", "kernels", "--batch", "9", "--context", "7")
    assert "too little memory for --batch 9 and --context 7" in error
    monkeypatch.setattr("cluster.bench.context.ProcessPoolExecutor", die)
    assert main(["bench", "context", "--context", "7"]) == 1
    assert "a context of 7 tokens: its process was ended, most likely for want of memory" in capsys.readouterr().err
