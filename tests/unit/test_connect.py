"""The command line's client before it connects: its options, key, certificates and errors."""

import time
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import cli
from cluster.cli.arguments import cluster_config
from cluster.client import options
from cluster.client.grpc_client import Client
from cluster.client.grpc_errors import _short
from cluster.config import ClusterConfig
from cluster.console import LoadProgress
from cluster.errors import InvalidRequest, SetupError
from cluster.runtime.front.haproxy import MAX_MESSAGE_BYTES
from cluster.runtime.front.tls import GrpcFront
from cluster.runtime.start.served import ServeOptions
from cluster.serving.admission.api_keys import ApiKeys, parse_keys
from cluster.types import ChatMessage, SamplingParams


def parsed(*arguments):
    parser = ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(arguments)


def metadata(*arguments):
    with options.connect(parsed(*arguments)) as client:
        return {name: value for name, value in client._metadata if name == "authorization"}


def test_the_key_is_that_of_the_file_else_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("moe-file\n")
    monkeypatch.delenv(options.API_KEY, raising=False)
    assert metadata() == {}
    monkeypatch.setenv(options.API_KEY, "moe-environment")
    assert metadata() == {"authorization": "Bearer moe-environment"}
    assert metadata("--api-key-file", str(tmp_path / "key")) == {"authorization": "Bearer moe-file"}
    with pytest.raises(SetupError, match="nothing cannot be read"):
        metadata("--api-key-file", str(tmp_path / "nothing"))


@pytest.mark.parametrize("address", ["", " ", "http://127.0.0.1:9000", "HTTPS://host"])
def test_a_text_that_is_no_address_is_one_line_and_exit_code_2(address, capfd):
    for command in (["generate", "hello"], ["chat"]):
        assert cli.main([*command, "--address", address]) == 2
        error = capfd.readouterr().err
        assert error == f"moe-cluster: --address is {address!r}, HOST:PORT is needed, without http://\n"


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e300", "0", "-1"])
def test_an_interval_that_no_clock_keeps_is_wrong_usage(seconds, capfd):
    assert cli.main(["top", "--interval", seconds]) == 2
    assert capfd.readouterr().err.startswith("moe-cluster: --interval is ")


def test_any_tls_option_means_tls(tmp_path):
    for option in ("--tls-ca", "--tls-cert", "--tls-key"):
        with pytest.raises(SetupError):
            options.connect(parsed(option, str(tmp_path / "nothing")))
    options.connect(parsed("--tls")).close()


def test_keys_new_prints_the_key_beside_and_its_line_for_the_file(capsys):
    assert cli.main(["keys", "new", "alice"]) == 0
    output = capsys.readouterr()
    [key] = [line for line in output.err.splitlines() if line.startswith("moe-")]
    [known] = parse_keys(output.out, "stdout")
    assert known.name == "alice"
    assert key not in output.out
    assert cli.main(["keys", "new", "alice smith"]) == 2


def test_serve_refuses_impossible_arguments():
    front = GrpcFront(host="0.0.0.0")
    with pytest.raises(SetupError, match="use --proxy haproxy"):
        ServeOptions(haproxy=False, front=front).front_environment()
    with pytest.raises(SetupError, match=r"127\.0\.0\.1:6379 runs already.*MOE_CLUSTER_GRPC_HOST=0\.0\.0\.0"):
        ServeOptions(ray_address="127.0.0.1:6379", front=front).front_environment()
    assert ServeOptions(ray_address="127.0.0.1:6379").front_environment() == {}


def test_grpc_takes_the_largest_request_and_no_gigabytes(tmp_path):
    def limit(max_request_bytes):
        config = ClusterConfig(model="m", max_request_bytes=max_request_bytes)
        return int(ServeOptions().serve_environment(tmp_path, config)["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"])

    assert limit(1 << 20) == MAX_MESSAGE_BYTES
    assert limit(1 << 28) == 1 << 28


def test_the_files_of_serve_are_found_wherever_its_processes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = cli._parser().parse_args(["serve", "model", "--api-keys-file", "keys.txt"])
    assert cluster_config(args, args.model).api_keys_file == str(Path(tmp_path, "keys.txt").resolve())


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-tokens", "-5"), ("--temperature", "-1.5"), ("--top-p", "nan"), ("--top-k", "-2"), ("--seed", "-1")],
)
def test_a_sampling_value_that_no_server_takes_is_wrong_usage(command, option, value, capsys):
    """No server is asked: none answers at this address, which would be exit code 1."""
    assert cli.main([*command, "--address", "127.0.0.1:1", f"{option}={value}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moe-cluster: {option} is {value}, it must be ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00binary", "no text"),
        (b"moe-one\nmoe-two\n", "2 words in 2 lines"),
        (b"alice " + b"0" * 64, "2 words in 1 lines"),
        ("moe-schlüssel".encode(), "characters that no key has"),
        (b"moe-\x00key", "characters that no key has"),
        (b"moe-\x1bkey", "characters that no key has"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
    ],
)
def test_a_file_without_exactly_one_key_is_one_line_and_exit_code_2(tmp_path, capsys, content, words):
    file = tmp_path / "key"
    file.write_bytes(content)
    assert cli.main(["generate", "hi", "--address", "127.0.0.1:1", "--api-key-file", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moe-cluster: --api-key-file {file} ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["moe-one moe-two", "moe-one\nmoe-two", "moe-ü", "moe-\udcff", "a\x7f"])
def test_an_environment_without_exactly_one_key_is_refused(monkeypatch, value):
    monkeypatch.setenv(options.API_KEY, value)
    with pytest.raises(SetupError, match=r"\$MOE_CLUSTER_API_KEY has"):
        metadata()


def test_a_key_may_have_white_space_and_a_byte_order_mark_around_it(tmp_path):
    (tmp_path / "key").write_bytes(b"\xef\xbb\xbf moe-file\r\n\r\n")
    assert metadata("--api-key-file", str(tmp_path / "key")) == {"authorization": "Bearer moe-file"}


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"\x00" * 5000, "müller ".encode() + b"0" * 64, b"a" * 100_000,
     b"a " + b"0" * 64 + b" concurrent=" + b"9" * 5000, b"a " + b"0" * 64 + b" x" * 5000],
)  # fmt: skip
def test_a_servers_file_of_keys_with_anything_in_it_is_one_short_line(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(SetupError) as refusal:
        ApiKeys(tmp_path / "keys", time.monotonic)
    assert len(str(refusal.value)) < 400
    assert len(str(refusal.value).splitlines()) == 1


def test_a_servers_file_of_keys_that_is_no_text_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "keys").write_bytes(b"a\xff")
    with pytest.raises(SetupError, match=r"keys is no text \(byte 1\): lines as `moe-cluster keys new NAME` prints"):
        ApiKeys(tmp_path / "keys", time.monotonic)
    with pytest.raises(SetupError, match=r"nothing cannot be read \(No such file or directory\): it must be there"):
        ApiKeys(tmp_path / "nothing", time.monotonic)


@pytest.mark.parametrize("option", ["--tls-ca", "--tls-cert"])
def test_a_file_that_is_no_pem_is_named(tmp_path, option):
    (tmp_path / "junk").write_bytes(b"\xff\x00junk")
    pair = ["--tls-key", str(tmp_path / "junk")] if option == "--tls-cert" else []
    with pytest.raises(SetupError, match="junk is no PEM file"):
        options.connect(parsed(option, str(tmp_path / "junk"), *pair))


def test_a_failed_handshake_is_said_by_its_last_cause():
    """As grpcio 1.85 gives them, with a server whose certificate nobody signed that is trusted, and one without TLS."""
    chain = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:44023: Ssl handshake failed "
        "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:"
        " unable to get local issuer certificate: OK"
    )
    assert _short(chain) == "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"
    assert _short("UNAVAILABLE: ipv4:127.0.0.1:44023: Socket closed") == "Socket closed"


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("\udcff", {}, "input"),
        ([1, "a"], {}, "token_ids"),
        ([-1], {}, "input"),
        ([2**40], {}, "input"),
        (5, {}, "token_ids"),
        ([ChatMessage(role="user", content=5)], {}, "chat"),
        ([ChatMessage(role="user", content="a"), 5], {}, "chat"),
    ],
)
def test_a_value_that_no_message_carries_is_an_invalid_request(prompt, params, field):
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as refusal:
        next(client.stream(prompt, SamplingParams(**params)))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8g", 8 << 30), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("100", 100), ("7K", 7168),
     ("2TiB", 2 << 40), ("64 b", 64)],
)  # fmt: skip
def test_a_size_may_have_a_unit(text, size):
    args = cli._parser().parse_args(["serve", "model", "--kv-cache-bytes", text])
    assert args.kv_cache_bytes == size


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1", "1e9", "8 Gi B", "nan", "9" * 5000])
def test_a_text_that_is_no_size_is_wrong_usage(text, capsys):
    with pytest.raises(SystemExit) as end:
        cli._parser().parse_args(["serve", "model", f"--kv-cache-bytes={text}"])
    assert end.value.code == 2
    assert "8GiB" in capsys.readouterr().err


def test_a_shard_that_is_up_has_a_full_bar_whatever_was_heard_of_its_bytes():
    """It may be up before the last of its bytes are told: its bar then stayed at 0.0 MB for good."""
    with LoadProgress("starting") as progress:
        for state, loaded in (("loading", 0), ("up", 0)):
            shard = SimpleNamespace(shard_id=0, state=state, loaded_bytes=loaded, total_bytes=100)
            progress.update(SimpleNamespace(shards=[shard], replicas=[]))
        [task] = progress._progress.tasks
    assert (task.completed, task.total, task.finished) == (100, 100, True)
