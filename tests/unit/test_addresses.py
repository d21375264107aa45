"""Addresses of servers are refused when they are read, in one line, whatever command has them. Connects to nothing."""

import pytest

from cluster.cli import main
from cluster.client.urls import server_url
from cluster.inputs import is_host

WRONG = (
    "a b:1",
    "a\tb:1",
    " :1",
    "",
    "-a:1",
    "a..b:1",
    "h:",
    "h:+1",
    "h:0",
    "h:65536",
    "h:x",
    "u@h:1",
    "[::1]x:1",
    "h/p:1",
)


@pytest.mark.parametrize("address", WRONG)
@pytest.mark.parametrize(
    "command",
    [
        ["bench", "serve", "--http"], ["bench", "serve", "--address"], ["chaos", "--http"], ["chaos", "--address"],
        ["batch", "in.jsonl", "out.jsonl", "--address"], ["generate", "hi", "--address"], ["chat", "--address"],
        ["eval", "--text", "t.txt", "--address"],
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused_when_it_is_read(command, address, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("in.jsonl", "t.txt"):
        (tmp_path / name).write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n')
    if command[:1] == ["chaos"]:
        if command[-1] == "--http" and not address:
            return  # none: it asks over gRPC
        monkeypatch.setattr("cluster.cli.running.find_ray", lambda *_: pytest.fail("it looks for a Ray"))
    assert main([*command[:-1], f"{command[-1]}={address}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moe-cluster: {command[-1]} is ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "scheme", "url"),
    [
        ("h:1", "http", "http://h:1"), ("h", "https", "https://h"), ("http://h:1/v1/", "https", "http://h:1"),
        ("https://[::1]:8000/", "http", "https://[::1]:8000"), ("Köln.example:80", "http", "http://Köln.example:80"),
    ],
)  # fmt: skip
def test_an_address_is_a_host_with_a_port_or_a_url(address, scheme, url):
    assert server_url(address, "--http", scheme=scheme).geturl() == url


@pytest.mark.parametrize("host", ["localhost", "a-b.c_d.example.", "127.0.0.1", "::1", "[::1]", "fe80::1%eth0", "köln"])
def test_hosts(host):
    assert is_host(host)


@pytest.mark.parametrize(
    "host", ["", "a b", "a\n", "-a", "a..b", "[a]", "[::1", "::g", "a/b", "x" * 64, "a." * 127 + "a"]
)
def test_what_is_no_host(host):
    assert not is_host(host)
