"""Arguments that no command can use: each is refused in one line that names it, with exit code 2, before any work."""

import json

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


@pytest.mark.parametrize("shards", ["--expert-shards", "--attention-replicas"])
def test_no_process_is_no_scale(shards, capsys):
    """Before a cluster is looked for, and before the other half of the change."""
    for count in ("0", "-1"):
        error = refused(capsys, "scale", f"{shards}={count}", "--ray-address", DEAD)
        assert f"{shards} is {count}, at least 1 is needed" in error


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
