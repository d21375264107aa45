"""`moe-cluster bench growth` on a system whose step takes a known time."""

import argparse
import json

import pytest

from cluster.bench import add_arguments
from cluster.bench import growth as bench_growth
from cluster.bench.growth import measure_growth
from cluster.bench.growth_points import plan_points
from cluster.errors import SetupError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["growth", *arguments])


class SlowSystem:
    """A step takes 1 ms for each sequence and 2 ms for each shard, a prompt 5 ms."""

    detail = "slow"

    def __init__(self, clock, shards):
        self.clock, self.shards = clock, shards

    def generate(self, prompts, num_tokens):
        self.clock[0] += 0.005 + (num_tokens - 1) * (0.001 * len(prompts) + 0.002 * self.shards)
        return [num_tokens] * len(prompts)

    def close(self):
        pass


def test_each_axis_is_varied_alone():
    points = plan_points(parse("--layers", "8", "--batch", "1,4", "--context", "64", "--shards", "2,3"))
    assert [(p.axis, p.value) for p in points] == [
        ("batch", 1), ("batch", 4), ("context", 64), ("shards", 2), ("shards", 3), ("layers", 2), ("layers", 4),
        ("layers", 8),
    ]  # fmt: skip
    assert {(p.context, p.shards, p.layers) for p in points if p.axis == "batch"} == {(64, 2, 8)}


def test_a_dense_model_is_not_varied_by_shards():
    """Qwen2-0.5B has 24 layers; the points of depth are a quarter, a half and all of them."""
    points = plan_points(parse("--shapes", "qwen2-0.5b", "--batch", "1", "--context", "64"))
    assert [(p.axis, p.value) for p in points] == [
        ("batch", 1), ("context", 64), ("layers", 6), ("layers", 12), ("layers", 24),
    ]  # fmt: skip
    assert {p.shards for p in points} == {0}


def test_the_time_of_a_step_is_found(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    clock = [0.0]
    monkeypatch.setattr(bench_growth.time, "perf_counter", lambda: clock[0])
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    args = parse(
        "--shapes", "demo", "--checkpoint-dir", str(tmp_path), "--batch", "1,4", "--shards", "2,3", "--repeat", "1",
        "--json", str(file), "--plot", str(picture),
    )  # fmt: skip
    assert measure_growth(args, lambda spec, room: SlowSystem(clock, spec.num_shards)) == 0
    found = {(point["axis"], point[point["axis"]]): point["step_ms"] for point in json.loads(file.read_text())}
    assert found["batch", 1] == pytest.approx(1 + 2 * 2)
    assert found["batch", 4] == pytest.approx(4 + 2 * 2)
    assert found["shards", 3] == pytest.approx(8 + 2 * 3)
    assert picture.stat().st_size > 1000
    assert "| batch   | 4     | 64      | 2      |" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["batch", "context", "shards", "layers", "repeat"])
def test_a_number_below_one_is_refused_before_anything_is_measured(option):
    with pytest.raises(SetupError, match=f"--{option} has 0, numbers from 1 are needed"):
        measure_growth(parse(f"--{option}", "0"), lambda spec, room: pytest.fail("something starts"))
