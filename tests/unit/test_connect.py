"""What the command line says to a server and of one, before anything is connected."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from cluster import cli, connect
from cluster.cli.arguments import cluster_config
from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.runtime.grpc_front import GrpcFront
from cluster.runtime.haproxy import MAX_MESSAGE_BYTES
from cluster.runtime.launch import ServeOptions
from cluster.serving.api_keys import parse_keys


def parsed(*arguments):
    parser = ArgumentParser()
    connect.add_arguments(parser)
    return parser.parse_args(arguments)


def metadata(*arguments):
    with connect.connect(parsed(*arguments)) as client:
        return dict(client._metadata)


def test_the_key_is_that_of_the_file_else_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("moe-file\n")
    monkeypatch.delenv(connect.API_KEY, raising=False)
    assert metadata() == {}
    monkeypatch.setenv(connect.API_KEY, "moe-environment")
    assert metadata() == {"authorization": "Bearer moe-environment"}
    assert metadata("--api-key-file", str(tmp_path / "key")) == {"authorization": "Bearer moe-file"}
    with pytest.raises(SetupError, match="nothing cannot be read"):
        metadata("--api-key-file", str(tmp_path / "nothing"))


def test_any_tls_option_means_tls(tmp_path):
    for option in ("--tls-ca", "--tls-cert", "--tls-key"):
        with pytest.raises(SetupError):
            connect.connect(parsed(option, str(tmp_path / "nothing")))
    connect.connect(parsed("--tls")).close()


def test_keys_new_prints_the_key_beside_and_its_line_for_the_file(capsys):
    assert cli.main(["keys", "new", "alice"]) == 0
    said = capsys.readouterr()
    [key] = [line for line in said.err.splitlines() if line.startswith("moe-")]
    [known] = parse_keys(said.out, "stdout")
    assert known.name == "alice"
    assert key not in said.out
    assert cli.main(["keys", "new", "alice smith"]) == 2


def test_what_serve_cannot_do_is_refused():
    front = GrpcFront(host="0.0.0.0")
    with pytest.raises(SetupError, match="use --proxy haproxy"):
        ServeOptions(haproxy=False, front=front).front_environment()
    with pytest.raises(SetupError, match=r"127\.0\.0\.1:6379 runs already.*MOE_CLUSTER_GRPC_HOST=0\.0\.0\.0"):
        ServeOptions(ray_address="127.0.0.1:6379", front=front).front_environment()
    assert ServeOptions(ray_address="127.0.0.1:6379").front_environment() == {}


def test_grpc_takes_what_a_request_may_have_and_not_gigabytes(tmp_path):
    def limit(max_request_bytes):
        config = ClusterConfig(model="m", max_request_bytes=max_request_bytes)
        return int(ServeOptions().serve_environment(tmp_path, config)["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"])

    assert limit(1 << 20) == MAX_MESSAGE_BYTES
    assert limit(1 << 28) == 1 << 28


def test_the_files_of_serve_are_found_wherever_its_processes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = cli._parser().parse_args(["serve", "model", "--api-keys-file", "keys.txt"])
    assert cluster_config(args, args.model).api_keys_file == str(Path(tmp_path, "keys.txt").resolve())
