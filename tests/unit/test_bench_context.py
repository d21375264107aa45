"""`moe-cluster bench context`: small contexts, measured for real."""

import argparse
import json

import pytest

from cluster.bench import add_arguments
from cluster.bench.context import measure_context, measure_one
from cluster.errors import SetupError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["context", *arguments])


def test_a_point_says_what_its_sequence_needs():
    """2 layers * 2 * 1 head * 32 numbers * 4 bytes are 512 a token; a window of 16 and a chunk of 32 keep 48."""
    point = measure_one(100, None, 32)
    assert point.cache_bytes == (100 + 17) * 512
    assert measure_one(100, 16, 32).cache_bytes == (48 + 17) * 512
    assert point.prefill_tokens_s > 0
    assert point.peak_bytes >= point.first_chunk_bytes > point.cache_bytes


@pytest.mark.slow
def test_contexts_are_measured_in_processes_of_their_own_and_shown(tmp_path, capsys):
    file = tmp_path / "context.json"
    assert measure_context(parse("--context", "64,96", "--chunk", "32", "--json", str(file))) == 0
    assert [point["context"] for point in json.loads(file.read_text())] == [64, 96]
    assert "| 96      |" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["context", "chunk", "window"])
def test_a_number_below_one_is_refused(option):
    with pytest.raises(SetupError, match=f"--{option} "):
        measure_context(parse(f"--{option}", "0"))
