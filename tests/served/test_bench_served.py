"""The benches that need a running cluster, small."""

import json
import os

import pytest

from cluster.cli import main

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--rate", "50"]], ids=["closed", "open"])
def test_load_on_a_server_is_measured(served, tmp_path, capsys, load):
    file = tmp_path / "result.json"
    address = f"127.0.0.1:{served.grpc_port}"
    sizes = ["--requests", "6", "--prompt-tokens", "5", "--output-tokens", "4", "--server-pid", str(os.getpid())]
    http = ["--http", served.http_url]
    assert main(["bench", "serve", "--address", address, *sizes, *load, *http, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["http"]["requests"], result["http"]["failed"]) == (6, 0)
    assert result["http"]["first_token_ms"][0] > 0
    assert (result["requests"], result["failed"]) == (6, 0)
    assert all(50 << 20 < taken < 50 << 30 for taken in result["server_bytes"])
    assert 0 < result["first_token_ms"][0] <= result["first_token_ms"][2]
    assert "0 failed, 0 refused; HTTP / gRPC " in capsys.readouterr().out


def test_every_carrier_is_measured(ray_cluster, tmp_path):
    file = tmp_path / "result.json"
    assert main(["bench", "transport", "--rows", "1,8", "--repeat", "5", "--json", str(file)]) == 0
    found = {(result["carrier"], result["rows"]) for result in json.loads(file.read_text())}
    carriers = ("ray", "stream, one host", "stream, TCP")
    assert found == {(carrier, rows) for carrier in carriers for rows in (1, 8)}
